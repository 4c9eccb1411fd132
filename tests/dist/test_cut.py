"""The objective does not depend on how a batch is cut: ranks, tensor ranks and micro-batches against the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.dist.reference import config, uncut_step
from tests.dist.test_engine import launch

STAGES = "0123"
ONE_VIEW = {"self_guided": {"student_views": 1}}
AGAIN = {"parallel": {"teacher_features": "recompute"}}
PER_PASS = {"self_guided": {"negatives": "micro_batch"}}


def case(name: str, stage: str, tensor: int, micro: int, changes: dict | None = None) -> dict:
    return {"name": name, "stage": stage, "tensor": tensor, "micro": micro, "changes": changes or {}}


CASES: dict[int, list[dict]] = {}
for ranks in (1, 2, 4):
    cuts = [(t, m) for t in (1, 2) if t <= ranks for m in (1, 2, 4, 8) if m <= 8 * t // ranks]
    CASES[ranks] = [
        case(f"t{t}_micro{m}_stage{STAGES[(n + ranks) % 4]}", STAGES[(n + ranks) % 4], t, m)
        for n, (t, m) in enumerate(cuts)
    ]
CASES[1] += [case("one_view", "2", 1, 2, ONE_VIEW), case("again", "1", 1, 1, AGAIN), case("old", "1", 1, 2, PER_PASS)]
CASES[2] += [case("one_view_again", "3", 1, 2, {**ONE_VIEW, **AGAIN}), case("old", "1", 1, 1, PER_PASS)]
CASES[4] += [case("again", "3", 2, 1, AGAIN), case("one_view", "3", 1, 1, ONE_VIEW), case("old", "3", 2, 2, PER_PASS)]
CUT = [pytest.param(r, c, id=f"{r}ranks-{c['name']}") for r, some in CASES.items() for c in some if c["name"] != "old"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cut")
    for ranks, some in CASES.items():
        (out / f"{ranks}").mkdir()
        launch(ranks, "tests/dist/workers/cut_worker.py", str(out / f"{ranks}"), json.dumps(some))
    return out


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "c"), CUT)
def test_losses_and_gradients_are_those_of_the_whole_batch(runs, ranks, c):
    parts, gradients = uncut_step(config(**c["changes"]))
    got = torch.load(runs / f"{ranks}" / f"{c['name']}.pt")
    assert got["losses"].keys() == parts.keys() >= {"loss_step", "loss_view", "loss_mim", "spread_student"}
    for name, value in parts.items():
        assert got["losses"][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert got["gradients"].keys() == gradients.keys()
    for name, value in gradients.items():
        assert (got["gradients"][name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "images"), [(1, 2), (2, 2), (4, 4)])
def test_the_former_reading_compares_the_images_of_one_pass(runs, ranks, images):
    """``images`` = micro-batch x data ranks: the reference's negatives are cut there."""
    got = torch.load(runs / f"{ranks}" / "old.pt")["losses"]
    parts, _ = uncut_step(config(**PER_PASS), passes=8 // images)
    for name in ("loss", "loss_step", "loss_view"):
        assert got[name] == pytest.approx(parts[name], rel=1e-6), name
    whole, _ = uncut_step(config())
    assert got["loss_step"] < whole["loss_step"] - 0.3
