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


def run_program(program: str, *words: str) -> dict[str, float]:
    """The JSON that a program on the null device prints last."""
    env = {**os.environ, **device.environment(), "OMP_NUM_THREADS": "1", "NULLGPU_FINITE": "1"}
    env.pop("DS_ACCELERATOR", None)
    env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(*words, row)
    return row


@pytest.mark.parametrize(("run", "images", "stage", "recomputed", "compiled"), CASES)
def test_the_planned_peak_is_the_allocators(
    run: str, images: int, stage: int, recomputed: bool, compiled: bool
) -> None:
    words = [f"{images}", f"{stage}", str(recomputed).lower(), "on" if compiled else "off"]
    row = run_program(PROGRAM, run, *words)
    assert row["planned"] == pytest.approx(row["measured"], rel=0.05)


# Arguments: images sampled at once, cfg_scale. The states of training are not built: evaluation_bytes does not count them.
EVALUATION = """
import gc, json, sys
import torch
from megastar.config.load import load_config
from megastar.config.schema import TokenizerConfig
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.features import EffLite0
from megastar.model.transformer import Transformer
from megastar.parallel.evaluation_memory import evaluation_bytes
from megastar.sampling.distributed import SamplingPipeline
from megastar.sampling.options import SamplingOptions
from megastar.tokenizer.vq import VQModel

batch, scale = int(sys.argv[1]), float(sys.argv[2])
cfg = load_config("configs/run/star_b_50ep.yaml", [
    "data.shards=none", "data.val_shards=", "eval.every=10", "eval.samples=512", f"eval.batch={batch}",
    f"eval.cfg_scale={scale}",
])
with torch.device("cuda"):
    torch.empty(1)
    torch.cuda.reset_peak_memory_stats()
    net = Transformer(cfg.model).to(torch.bfloat16).requires_grad_(False)
    tokenizer = VQModel(TokenizerConfig()).requires_grad_(False).eval()
gc.collect()
made = Collector(EffLite0("cuda"))
options = SamplingOptions(cfg_scale=scale)
pipeline = SamplingPipeline(net, tokenizer, [0] * batch, options=options, batch=batch)
torch.cuda.reset_peak_memory_stats()
made.update(pipeline.sample_chunk(0))
planned = evaluation_bytes(cfg, TokenizerConfig(), "bf16")
print(json.dumps({"measured": torch.cuda.max_memory_allocated(), "planned": sum(planned.values()), "causes": planned}))
"""
IM2COL = 4 * 9 * 128 * 256**2  # bytes that torch's own convolution takes for an image where cuDNN is off, as here


@pytest.mark.parametrize(("batch", "scale"), [(16, 1.0), (16, 2.0), (48, 1.5)])
def test_the_planned_memory_of_an_evaluation_is_the_allocators(batch: int, scale: float) -> None:
    row = run_program(EVALUATION, str(batch), str(scale))
    assert row["planned"] == pytest.approx(row["measured"] - IM2COL, rel=0.05)
