"""`megastar status` and events.jsonl of runs that really trained."""

from __future__ import annotations

import json

from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from tests.integration.conftest import megastar


def test_a_run_that_was_trained(whole):
    happened = read_events(whole)
    assert [e["event"] for e in happened] == ["started", "saved", "saved", "saved", "finished"]
    assert happened[0]["steps"] == 12 and happened[0]["ranks"] == 2
    assert [e["checkpoint"] for e in happened if e["event"] == "saved"] == [f"step-{n:08d}" for n in (4, 8, 12)]
    s = status_of(whole)
    assert (s.state, s.step, s.steps, s.checkpoint_step, s.checkpoint_problem) == ("finished", 12, 12, 12, "")
    assert s.loss is not None and s.val_step == 12 and s.images_per_s and s.step_s and not s.saving
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert s.loss == [r["loss"] for r in rows if "loss" in r][-1]


def test_a_run_that_fails_and_is_resumed(world, tmp_path):
    """A loss that is not finite ends it; a lower rate goes on. Both are on record."""
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=6)
    megastar("train", config, "optim.lr=1e30", "optim.grad_clip=0", "faults.max_skips=0", check=False)
    s = status_of(tmp_path / "run")
    assert s.state == "stopped" and s.why.startswith("NonFiniteLoss: step ")
    megastar("train", config, "optim.lr=1e-4", "optim.grad_clip=0", check=False)
    kinds = [e["event"] for e in read_events(tmp_path / "run")]
    assert kinds[0] == "started" and kinds.count("error") == 1 and kinds[-1] == "finished"
