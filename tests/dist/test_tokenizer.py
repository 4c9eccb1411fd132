"""The tokenizer's training on several ranks: the state of one process, to 1e-5; resumed on other ranks; one sentence for bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests import forker
from tests.unit.engine.tokenizer.leaves import leaves_of

pytestmark = pytest.mark.dist
CONFIG = {
    "tokenizer": {
        "image_size": 32, "channels": 8, "channel_multipliers": [1, 2, 2], "res_blocks": 1, "z_channels": 8,
        "codebook_size": 256, "codebook_embed_dim": 4, "norm_groups": 4,
    },
    "steps": 8, "batch": 8, "warmup": 2, "lr": 1e-3, "continuous_steps": 3, "revive_every": 2, "perceptual": 0.0,
    "adversarial": 0.1, "adversarial_start": 4, "dtype": "fp32", "save_every": 100, "log_every": 2, "eval_every": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A configuration with 40 images of low frequencies."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((44, 40), Image.Resampling.BICUBIC).save(folder / f"class{i % 2}" / f"{i}.png")
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"pictures": str(folder)}))
    return path


def train(config: Path, out: Path, ranks: int, *words: str, **environment: str):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID")}
    command = ["-m", "megastar", "train-tokenizer", str(config), f"out={out}", *words]
    return forker.run(command, clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment, ranks)


def state(out: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(out / "last.pt", weights_only=True)
    loaded.pop("config")  # it has the name of the folder
    return {"/".join(map(str, name)): value for name, value in leaves_of(loaded)}


@pytest.fixture(scope="module")
def one(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    done = train(config, out, 0)
    assert done.returncode == 0, done.stderr + done.stdout
    return out


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]


def difference(a: Path, b: Path) -> float:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    worst = 0.0
    for name, x in first.items():
        y = second[name]
        if x.dtype.is_floating_point:
            worst = max(worst, (x - y).abs().max().item())
        else:
            assert torch.equal(x, y), name
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one_process(config, one, tmp_path, ranks):
    done = train(config, tmp_path, ranks)
    assert done.returncode == 0, done.stderr + done.stdout
    print(difference(one, tmp_path))
    assert difference(one, tmp_path) < 1e-5
    wanted = rows_of(one)
    assert any(r["dead"] for r in wanted) and "discriminator" in wanted[-1]  # revived, and against a discriminator
    for a, b in zip(wanted, rows_of(tmp_path), strict=True):
        for name in ("loss", "l2", "vq", "grad_norm", "discriminator", "dead", "lr"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), name
