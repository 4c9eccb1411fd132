"""A run resumes wherever its files lie now, says what changed, and notices that its folder is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from megastar.run_dir.events import read_events
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.integration.conftest import ROOT, TOKENIZER, environment, megastar

pytestmark = pytest.mark.long


def test_a_moved_run_resumes_and_records_what_changed(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=4)
    megastar("train", config)
    moved, codes, tokenizer = tmp_path / "x[/y] [red]z", tmp_path / "codes", tmp_path / "tokenizer.safetensors"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    shutil.copytree(world.codes("train"), codes)
    shutil.copy(world.tokenizer, tokenizer)
    places = [f"run={moved}", f"data.shards={codes}", f"data.tokenizer={tokenizer}", "train.steps=6", "optim.lr=1e-3"]
    done = megastar("train", config, *places)
    changes = [
        f"run {tmp_path / 'run'} -> {moved}",
        f"data.shards {world.codes('train')} -> {codes}",
        f"data.tokenizer {world.tokenizer} -> {tokenizer}",
        "optim.lr 0.003 -> 0.001",
        "train.steps 4 -> 6",
    ]
    assert [
        line.partition("changed since step-00000004: ")[2] for line in done.stdout.splitlines() if "changed" in line
    ] == changes
    assert [e["changes"] for e in read_events(moved) if e["event"] in ("started", "resumed")] == [[], changes]
    assert json.loads((moved / "checkpoints/step-00000006/megastar.json").read_text())["changes"] == changes
    assert [e["event"] for e in read_events(moved)][-1] == "finished" and not (tmp_path / "run").exists()

    torch.manual_seed(1)
    save_tokenizer(VQModel(TOKENIZER), tokenizer, {"seed": 1})
    places.remove(f"data.tokenizer={tokenizer}")
    for override, message in (
        (f"data.tokenizer={tokenizer}", "tokenizer"),
        ("train.global_batch=4", "holds a run of another configuration: train.global_batch: 8 -> 4"),
        (
            f"train.init={tokenizer}",
            f"train.init = '{tokenizer}': {moved}/checkpoints/step-00000006 started from 'random weights'",
        ),
    ):
        refused = megastar("train", config, *places, "train.steps=8", override, check=False)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(("ranks", "replace"), [(1, True), (2, False)])
def test_a_run_folder_that_is_gone_ends_the_run(world, tmp_path, ranks, replace):
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100_000, save_every=5000, val_every=0, log_every=5)
    command = [sys.executable, "-m", "megastar", "train", str(config), "--nproc", str(ranks)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 200
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        run.rename(tmp_path / "elsewhere")  # at once: the run would write again what is removed file by file
        if replace:
            run.mkdir()
        else:
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    what = "was replaced" if replace else "was removed or moved"
    assert process.returncode == 2, errors
    assert [line for line in errors.splitlines() if "megastar: error" in line] == [
        f"megastar: error: {run} {what} while the run writes into it: nothing more can be saved there; put it back, or "
        "start again with another run=..."
    ]
    assert "Traceback" not in errors
    assert os.path.exists(run / "checkpoints") is False
