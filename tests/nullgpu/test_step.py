"""Synchronizations of the host with the device in one training step, on the null GPU: make test-nullgpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.nullgpu import device
from tests.nullgpu.test_commands import ROOT

pytestmark = pytest.mark.nullgpu
STEP = """
import json, os, sys, warnings
import torch
from megastar.config.load import load_config
from megastar.engine.step_benchmark import one_step, random_batch
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build

cfg = load_config("configs/run/star_b_50ep.yaml", sys.argv[1:])
ctx = start(cfg)
assert ctx.device.type == "cuda"
engines = build(cfg, ctx)
engines.student.train()
batch = random_batch(cfg.model, cfg.views, 8)
for step in range(3):
    one_step(cfg, ctx, engines, batch, step)
whole, synchronize = [], torch.cuda.synchronize
torch.cuda.synchronize = lambda *device: whole.append("torch.cuda.synchronize") or synchronize(*device)
torch.cuda.set_sync_debug_mode("warn")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    one_step(cfg, ctx, engines, batch, 3)
torch.cuda.set_sync_debug_mode("default")
found = [f"{w.filename}:{w.lineno}" for w in found if "called a synchronizing" in str(w.message)]
print(json.dumps(found + whole))
sys.stdout.flush()
os._exit(0)
"""
SMALL = (
    "data.shards=none", "data.val_shards=", "data.tokenizer=", "model.n_layer=3", "model.dim=64", "model.n_head=2",
    "self_guided.contrastive_block=2", "train.compile=off", "self_guided.projector_dim=64", "train.global_batch=8", "train.dtype=bf16",
)  # fmt: skip


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_the_host_waits_at_most_twice_in_a_step(stage: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", **device.environment()}
    env["PYTHONPATH"] = f"{device.HERE / 'site'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-c", STEP, *SMALL, f"parallel.deepspeed={stage}"]
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=500, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    places = json.loads(done.stdout.splitlines()[-1])
    # One is the skip decision of all ranks alike; none would mean that nothing is counted.
    assert 1 <= len(places) <= 2, places
    assert "device_id" not in done.stdout + done.stderr
