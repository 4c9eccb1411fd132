"""The peak of a step that `megastar plan` estimates against that of torch's CUDA allocator, which is real on the null device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.nullgpu import device
from tests.nullgpu.test_commands import ROOT

pytestmark = pytest.mark.nullgpu

# Arguments: run file, images, ZeRO stage, recomputed, compiled. The check of attention backends compares numbers, which mean nothing here.
PROGRAM = """
import json, sys
from megastar.config.deepspeed import read_deepspeed
from megastar.config.load import load_config
from megastar.engine.step_benchmark import step_speed
from megastar.engine.zero.process_group import start
from megastar.model.kernels import select
from megastar.parallel.budget import Zero, memory_bytes

run, images, stage, recomputed, compiled = sys.argv[1:]
select._check = lambda *arguments: None
cfg = load_config(f"configs/run/{run}_50ep.yaml", [
    "data.shards=none", "data.val_shards=", "data.tokenizer=", "train.dtype=bf16", f"train.compile={compiled}",
    f"parallel.deepspeed=zero{stage}", f"parallel.activation_checkpointing={recomputed}",
])
measured = step_speed(cfg, start(cfg), int(images), steps=2)["peak_gib"]
zero = Zero.read(read_deepspeed(cfg.parallel.deepspeed))
memory, _ = memory_bytes(
    cfg.model, cfg.self_guided, zero, 1, 1, int(images), recomputed == "true", "bf16", compiled == "on"
)
print(json.dumps({"measured": measured, "planned": sum(memory.values()) / 2**30}))
"""
CASES = [
    (run, images, stage, recomputed, compiled)
    for run, images in (("star_b", 64), ("ar_l", 128), ("star_xl", 32))
    for stage, recomputed, compiled in (
        (1, False, False),
        (1, False, True),
        (1, True, False),
        (3, False, True),
        (3, True, False),
    )
]


@pytest.mark.parametrize(("run", "images", "stage", "recomputed", "compiled"), CASES)
def test_the_planned_peak_is_the_allocators(
    run: str, images: int, stage: int, recomputed: bool, compiled: bool
) -> None:
    words = [f"{images}", f"{stage}", str(recomputed).lower(), "on" if compiled else "off"]
    env = {**os.environ, **device.environment(), "OMP_NUM_THREADS": "1", "NULLGPU_FINITE": "1"}
    env.pop("DS_ACCELERATOR", None)
    env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, run, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    print(run, *words, row)
    assert row["planned"] == pytest.approx(row["measured"], rel=0.05)
