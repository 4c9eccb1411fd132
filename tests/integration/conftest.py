"""A whole small world, made once: pictures of three shapes, a tokenizer file, token shards of two splits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console

from megastar.config.schema import TokenizerConfig
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests import forker
from tests.integration.helpers.s3 import relay, s3, use_s3, weed, weed_session  # noqa: F401

ROOT = Path(__file__).parents[2]
TOKENIZER = TokenizerConfig(
    image_size=16, channels=8, channel_multipliers=[1, 2, 2], res_blocks=1, z_channels=8, codebook_size=64,
    codebook_embed_dim=4, norm_groups=4,
)  # fmt: skip


@dataclass
class World:
    folder: Path

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.safetensors"

    def codes(self, split: str) -> Path:
        return self.folder / "codes" / split

    def write_config(self, path: Path, run: Path, **train: object) -> Path:
        """A run of a two-block model with dropout on, in fp32."""
        fields = {
            "global_batch": 8,
            "steps": 12,
            "epochs": 0,
            "dtype": "fp32",
            "log_every": 1,
            "val_every": 6,
            "val_images": 6,
            "save_every": 4,
        }
        lines = "\n".join(f"  {k}: {v}" for k, v in {**fields, **train}.items())
        path.write_text(f"""
run: {run}
model: {{name: tiny, n_layer: 2, n_head: 2, dim: 32, multiple_of: 16, vocab_size: 64, num_classes: 3, image_tokens: 16}}
data: {{shards: {self.codes("train")}, val_shards: {self.codes("val")}, tokenizer: {self.tokenizer}, window: 2}}
self_guided: {{contrastive_block: 1, projector_dim: 16, teacher_decay: 0.9}}
optim: {{lr: 0.003, scale_lr: false, warmup_steps: 2}}
faults: {{slow_ratio: 0}}
train:
{lines}
""")
        return path


def draw(shape: int, seed: int) -> Image.Image:
    rng = np.random.default_rng([shape, seed])
    image = Image.new("RGB", (24, 20), "white")
    pen, colour = ImageDraw.Draw(image), tuple(int(c) for c in rng.integers(0, 200, 3))
    x, y, r = (int(v) for v in (rng.integers(2, 8), rng.integers(2, 6), rng.integers(6, 12)))
    box = (x, y, x + r, y + r)
    if shape == 0:
        pen.ellipse(box, fill=colour)
    elif shape == 1:
        pen.rectangle(box, fill=colour)
    else:
        pen.line(box, fill=colour, width=3)
    return image


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    from megastar.data.pretokenize.runner import pretokenize

    w = World(tmp_path_factory.mktemp("world"))
    for split, count in (("train", 9), ("val", 3)):
        for shape, name in enumerate(("circle", "square", "stroke")):
            folder = w.pictures / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                draw(shape, i + (100 if split == "val" else 0)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    save_tokenizer(VQModel(TOKENIZER), w.tokenizer, {"seed": 0})
    for split in ("train", "val"):
        pretokenize(
            w.pictures, split, w.tokenizer, w.codes(split), shard_size=10, workers=1, console=Console(quiet=True)
        )
    return w


def environment() -> dict[str, str]:
    """``RES_OPTIONS``: for torchrun's own store, which starts before megastar (megastar/host.py)."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "RES_OPTIONS": "timeout:1 attempts:3",
    }


def megastar(
    *words: object, ranks: int = 1, check: bool = True, timeout: int = 300, launcher: bool = False
) -> subprocess.CompletedProcess:
    """The command line, as a user would call it. Its process, and a training's ranks, come without their imports; but from
    torchrun with ``launcher``, and from a process of its own with ``--nproc``."""
    command = [sys.executable, "-m", "megastar", *map(str, words)]
    if "--nproc" not in words and not launcher and (ranks == 1 or words[0] == "train"):
        done = forker.run(command[1:], environment(), 0 if ranks == 1 else ranks, timeout)
    else:
        if ranks > 1:
            command[2:] = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    config = world.write_config(folder / "run.yaml", folder / "run")
    megastar("train", config, ranks=2, launcher=True)
    return folder / "run"
