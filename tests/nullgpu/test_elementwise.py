"""The elementwise work of a block on the null GPU: the RoPE kernel is launched, and bytes moved are those that plans assume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megastar.parallel import cost
from tests.nullgpu import device

pytestmark = pytest.mark.nullgpu
ROOT = Path(__file__).resolve().parents[2]
ROTATION = """
import torch
from megastar.config.schema import ModelConfig
from megastar.model import attention, fused
from megastar.model.kernels.triton_rope import SplitQKV
from megastar.model.transformer import Transformer

fused.disagreement = lambda *_: compared.append(1)  # None: the kernel is used
compared, used, rotate = [], [], SplitQKV.apply
SplitQKV.apply = lambda *args: (used.append(1), rotate(*args))[1]
model = ModelConfig(n_layer=2, n_head=2, dim=128, multiple_of=64, vocab_size=16, num_classes=4, image_tokens=16)
net = Transformer(model).cuda().bfloat16()
tokens = torch.zeros(3, 16, dtype=torch.int64, device="cuda")
net(tokens[:, 0], tokens[:, :-1], targets=tokens).loss.backward()
assert net.layers[1].attention.wqkv.weight.grad.shape == (384, 128)
assert len(used) == 2 and len(compared) == 1, (used, compared)
"""


def python(*words: str) -> str:
    env = {**os.environ, **device.environment(), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(device.HERE / "site"), str(ROOT)])
    env.pop("CUDA_VISIBLE_DEVICES", None)  # tests/conftest.py hides real GPUs
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, timeout=600, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_rotation_is_launched_and_differentiated() -> None:
    python("-c", ROTATION)


def test_plans_assume_the_bytes_that_blocks_move() -> None:
    rows = json.loads(python("benchmarks/gpu/bytes_moved.py", "--size", "b", "--sequences", "64", "--json"))
    found = {row["way"]: row for row in rows}
    for way, assumed in (("eager", cost.EAGER), ("compiled", cost.COMPILED)):
        for name, moved in zip(("forward", "backward"), assumed, strict=True):
            row = found[way][name]
            counted = (row["stream"], row["split"] + row["attention"], row["ffn"])
            assert tuple(moved) == pytest.approx(counted, rel=0.02), (way, name)
    assert found["compiled"]["forward"]["total"] < 60  # a graph break or an unfused rotation exceeds it
