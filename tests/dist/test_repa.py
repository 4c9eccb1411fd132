"""Representation alignment on 2 and 4 ranks against one process, alone and with ST-AR: losses, gradients, weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megastar.parallel.budget import state_bytes
from tests.dist.reference import config, uncut_step
from tests.dist.test_engine import SAVED, case, check_case, launch

pytestmark = pytest.mark.long

ALONE = {"self_guided": {"enabled": False}, "repa": {"enabled": True}, "optim": {"grad_clip": 0.05}}
BOTH = {"repa": {"enabled": True, "weight": 0.7, "match": "input", "block": 2}}
ONE_VIEW = {**BOTH, "self_guided": {"student_views": 1}}
RECOMPUTED = {**ALONE, "parallel": {"activation_checkpointing": True}}
CASES: dict[int, list[dict]] = {
    4: [case(f"t2_alone_stage{s}", s, 2, **ALONE) for s in "0123"]
    + [case(f"t1_both_stage{s}", s, 1, **BOTH) for s in ("0", "1", "2", "3_cut")]
    + [case("t2_both_accumulated", "3", 2, 2, **ONE_VIEW), case("t1_alone_accumulated", "2", 1, 2, **ALONE)]
    + [case("t2_bf16", "1", 2, **ALONE, train={"dtype": "bf16"}), case("t2_recomputed", "3_cut", 2, **RECOMPUTED)]
    + [case("saved", "3", 2, save_at=SAVED, **BOTH), case("t1_resumed", "1", 1, resume="saved", **BOTH)],
    2: [case(f"t{t}_alone_stage{s}", s, t, **ALONE) for t, s in ((1, "3_cut"), (2, "0"), (1, "1"))]
    + [case("t1_validated", "3_cut", 1, 2, validate=True, **BOTH), case("t2_both", "3", 2, **BOTH)]
    + [case("t2_resumed", "3", 2, resume="saved", **BOTH)],
}
COMPARED = [pytest.param(r, c, id=f"{r}ranks-{c['name']}") for r, some in CASES.items() for c in some]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("repa")
    for ranks, some in CASES.items():
        (out / f"{ranks}").mkdir()
        if ranks != 4:
            (out / f"{ranks}" / "saved").symlink_to(out / "4" / "saved")
        launch(ranks, "tests/dist/workers/engine_worker.py", str(out / f"{ranks}"), json.dumps(some))
    return out


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "c"), COMPARED)
def test_sharded_training_equals_one_process(runs, ranks, c):
    check_case(runs, ranks, c)
    rows = json.loads((runs / f"{ranks}" / f"{c['name']}.json").read_text())["history"]
    assert all(0 < row["loss_repa"] < 2 for row in rows)
    assert ("loss_mim" in rows[0]) == (
        "self_guided" not in c["changes"] or c["changes"]["self_guided"].get("enabled", True)
    )


@pytest.mark.dist
@pytest.mark.parametrize("name", ["t2_alone_stage1", "t1_both_stage3_cut"])
def test_what_a_rank_holds_is_what_is_planned(runs, name):
    c = next(c for c in CASES[4] if c["name"] == name)
    got, cfg = json.loads((runs / f"4/{name}.json").read_text())["bytes"], config(**c["changes"])
    stage = 3 if "3" in name.partition("stage")[2] else 1
    want, _ = state_bytes(cfg.model, cfg.self_guided, stage, c["tensor"], 4 // c["tensor"], "fp32", repa=cfg.repa)
    want["optimizer"] += want["ema"]
    for cause in ("weights", "optimizer", "teacher"):
        assert got[cause] == pytest.approx(want[cause], rel=0.05), cause


# test_cut.py has every cut, without this loss. Here each tensor and data size, micro-batch and ZeRO stage occurs.
CUT: dict[int, list[dict]] = {
    count: [
        {"name": f"t{t}_micro{m}", "stage": stage, "tensor": t, "micro": m, "changes": BOTH} for t, m, stage in cuts
    ]
    for count, cuts in {
        1: [(1, 4, "3"), (1, 8, "0")],
        2: [(1, 2, "3"), (2, 1, "1"), (2, 8, "0")],
        4: [(1, 2, "1"), (2, 1, "2"), (2, 2, "3")],
    }.items()
}
CUTS = [pytest.param(r, c, id=f"{r}ranks-{c['name']}") for r, some in CUT.items() for c in some]


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cut_repa")
    for ranks, some in CUT.items():
        (out / f"{ranks}").mkdir()
        launch(ranks, "tests/dist/workers/cut_worker.py", str(out / f"{ranks}"), json.dumps(some))
    return out


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "c"), CUTS)
def test_losses_and_gradients_do_not_depend_on_the_cut(cut, ranks, c):
    """Ranks, tensor ranks and micro-batches against the whole batch in one pass."""
    parts, gradients = uncut_step(config(**BOTH))
    got = torch.load(cut / f"{ranks}" / f"{c['name']}.pt")
    assert got["losses"].keys() == parts.keys() >= {"loss_repa", "loss_view", "loss_mim"}
    for name, value in parts.items():
        assert got["losses"][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert got["gradients"].keys() == gradients.keys() >= {"repa_projector.w3.bias"}
    for name, value in gradients.items():
        assert value.norm() and (got["gradients"][name] - value).norm() <= 1e-6 * value.norm(), name
