"""Runs of earlier versions resume: tests/data/run_v0_1_0 holds two that megastar 0.1.0 wrote. Only the command line is used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.integration.conftest import ROOT, environment

pytestmark = [pytest.mark.dist, pytest.mark.long]

OLD = ROOT / "tests/data/run_v0_1_0"
EXPECTED = json.loads((OLD / "expected.json").read_text())
# Equal to the last bit on the CPU that wrote them; kernels for other instruction sets (ATEN_CPU_CAPABILITY=default,
# MKL_ENABLE_INSTRUCTIONS=SSE4_2) differ by up to 1.3e-6 of a value.
TOLERANCE = {"rel": 1e-5, "abs": 1e-8}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old runs; their paths are relative to it."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def megastar(folder: Path, *words: str) -> str:
    """What the command prints, run in ``folder``."""
    command = [sys.executable, "-m", "megastar", *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> all metrics written for it."""
    out: dict[int, dict[str, Any]] = {}
    for row in lines(run / "metrics.jsonl"):
        out.setdefault(row["step"], {}).update(row)
    return out


def check_resumed(old: Path, name: str) -> None:
    """The run went on from step 4 to 8 as 0.1.0 continued it, and what it had written before is still there."""
    before, after = rows(OLD / name), rows(old / name)
    assert sorted(after) == list(range(1, 9))
    assert all(after[step] == row for step, row in before.items())
    for step, expected in EXPECTED[name].items():
        row = after[int(step)]
        assert {key: row[key] for key in expected} == pytest.approx(expected, **TOLERANCE), step

    events = lines(old / name / "events.jsonl")
    began = len(lines(OLD / name / "events.jsonl"))
    assert events[:began] == lines(OLD / name / "events.jsonl")
    assert (events[began]["event"], events[began]["step"]) == ("resumed", 4)
    assert (events[-1]["event"], events[-1]["step"]) == ("finished", 8)
    assert (old / name / "skipped.jsonl").read_bytes() == (OLD / name / "skipped.jsonl").read_bytes()
    assert (old / name / "checkpoints/latest").read_text() == "step-00000008\n"
    assert [p.name for p in (old / name / "checkpoints").glob("step-*")] == ["step-00000008"]  # keep_last: 1


def test_two_ranks_stopped_by_a_signal(old):
    megastar(old, "train", "zero3/config.yaml", "--nproc", "2")
    check_resumed(old, "zero3")


def test_a_finished_run_goes_on_with_moved_shards(old):
    """Behind a roll-back: the checkpoint's offset says which batch comes next."""
    (old / "shards").rename(old.parent / "moved")
    moved = [f"data.shards={old.parent}/moved/train", f"data.val_shards={old.parent}/moved/val"]
    megastar(old, "train", "zero1/config.yaml", "train.steps=8", *moved)
    check_resumed(old, "zero1")
    assert (old / "zero1/rollbacks.jsonl").read_bytes() == (OLD / "zero1/rollbacks.jsonl").read_bytes()


def test_the_batches_after_the_checkpoint_hold_the_same_samples(old):
    """Step 5 with a learning rate of 1e30 breaks the weights: the later steps are skipped, their ids recorded."""
    megastar(old, "train", "zero1/config.yaml", "train.steps=8", "optim.lr=1e30", "faults.max_skips=3")
    skipped = lines(old / "zero1/skipped.jsonl")[1:]
    assert [{key: row[key] for key in EXPECTED["zero1_batches"][0]} for row in skipped] == EXPECTED["zero1_batches"]


@pytest.mark.parametrize(("name", "state", "steps"), [("zero3", "stopped", 8), ("zero1", "finished", 4)])
def test_commands_read_it(old, name, state, steps):
    status = json.loads(megastar(old, "status", name, "--json"))
    last = {"state": state, "step": 4, "steps": steps, "checkpoint": "step-00000004", "checkpoint_problem": ""}
    assert {key: status[key] for key in last} == last
    assert status["loss"] == rows(old / name)[4]["loss"]

    inspected = megastar(old, "convert", "--inspect", "--verify", name)  # status 0: every hash is right
    checkpoint = old / name / "checkpoints/step-00000004"
    assert f"4 of {steps}" in inspected and all(p.name in inspected for p in checkpoint.glob("*-0*"))

    megastar(old, "convert", name, "--to", "safetensors", "--out", "ema.safetensors")
    states = [load_file(p) for p in sorted(checkpoint.glob("state-*.safetensors"))]  # flat: a rank has a part of each
    weights = {f"ema/transformer.{key}": weight for key, weight in load_file(old / "ema.safetensors").items()}
    assert weights.keys() == {key for key in states[0] if key.startswith("ema/transformer.")}
    for key, weight in weights.items():
        np.testing.assert_array_equal(weight.ravel(), np.concatenate([state[key] for state in states]), key)

    megastar(old, "report", name, "--no-samples", "--no-attention")
    page = (old / name / "report.html").read_text()
    assert all(json.dumps(event["text"])[1:-1] in page for event in lines(old / name / "events.jsonl"))
