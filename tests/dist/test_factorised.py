"""A factorised head in the sharded engine, also under tensor parallelism, against plain training in one process."""

from __future__ import annotations

import json

import pytest
import torch

from tests.dist.test_engine import case, launch, reference

FACTORISED = {"model": {"head": "factorised", "head_factors": [4, 8]}}
CASES = [
    case("t1_stage3", "3_cut", **FACTORISED),
    case("t2_stage1", "1", 2, **FACTORISED),
    case("t2_stage3", "3", 2, **FACTORISED),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("factorised")
    launch(2, "tests/dist/workers/engine_worker.py", str(out), json.dumps(CASES))
    return out


@pytest.mark.dist
@pytest.mark.parametrize("c", CASES, ids=lambda c: c["name"])
def test_sharded_training_equals_one_process(runs, c):
    wanted = reference(c)
    got = json.loads((runs / f"{c['name']}.json").read_text())
    assert len(got["history"]) == len(wanted["history"])
    for step, (a, b) in enumerate(zip(got["history"], wanted["history"], strict=True)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), step
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5), step
    weights = torch.load(runs / f"{c['name']}.pt")
    for kind in ("student", "ema"):
        expected = {k: v for k, v in wanted[kind].items() if not k.startswith("projector")}
        assert weights[kind].keys() == expected.keys() and any("output.mixers.0.w1" in k for k in expected)
        for name, value in expected.items():
            assert (weights[kind][name] - value).norm() <= 1e-5 * value.norm(), f"{kind} {name}"
