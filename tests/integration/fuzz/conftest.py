"""A small run with everything beside it, made once, and a copy of it for each case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megastar.checkpoint.convert import convert
from megastar.config.load import save_config
from megastar.config.schema import RunConfig
from megastar.sampling.npz import save_npz
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests import fuzz
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config
from tests.fuzz import Tally
from tests.integration.conftest import TOKENIZER
from tests.unit.data.shards.test_features import write_features
from tests.unit.data.shards.test_shards import write_set

STEPS = (2, 3)  # of the checkpoints


def small_config() -> RunConfig:
    cfg = config(
        model={"vocab_size": TOKENIZER.codebook_size},
        data={"shards": "codes", "val_shards": "codes", "tokenizer": "tokenizer.safetensors"},
    )
    cfg.run = "run"
    return cfg


def write_run(run: Path) -> None:
    cfg = small_config()
    for step in STEPS:
        write_checkpoint(run, cfg, 2, 1, step)
    save_config(cfg, run / "config.yaml")
    rows = [{"step": s, "loss": 3.0 - s / 10, "loss_ar": 3.0, "step_s": 0.5, "images_per_s": 16.0} for s in range(1, 9)]
    rows.insert(4, {"step": 4, "val_loss_ar": 2.5, "val_s": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    time, both = "2026-01-31T12:00:00+00:00", {"host": "node", "job": "7", "text": "t"}
    events = [
        {"time": time, "event": "started", "step": 0, "ranks": 2, "steps": 8, "command": "c", "packages": {"a": "1"}},
        {"time": time, "event": "warning", "step": 1, "situation": "disk", "over": False},
        {"time": time, "event": "saved", "step": 2},
        {"time": time, "event": "signal", "step": 2},
        {"time": time, "event": "resumed", "step": 2, "ranks": 2, "steps": 8},
        {"time": time, "event": "warning", "step": 3, "situation": "upload", "over": False},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(both | event) + "\n" for event in events))
    score = {
        "epoch": 0.5,
        "metric": "FID",
        "samples": 9,
        "cfg_scale": 1.0,
        "weights": "ema",
        "against": "a",
        "key": "k",
    }
    scores = [score | {"step": s, "value": 9.0 - s, "seconds": 1.0, "time": time} for s in (2, 4, 6)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (run / "evaluating.json").write_text(json.dumps({"step": 8, "done": 3, "samples": 9}))
    (run / "heartbeats").mkdir()
    beat = {"time": time, "rank": 0, "host": "node", "pid": 5, "step": 3, "phase": "forward", "steps_s": 0.5}
    (run / "heartbeats" / "rank-00000.json").write_text(json.dumps(beat) + "\n")
    (run / "requeues.log").write_text("2026-01-31 12:00 requeue 1, excluding node3 node4, after status 85\n")
    (run / "bad_hosts.log").write_text("2026-01-31 12:00 node3 slow\n")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    torch.manual_seed(0)
    write_run(folder / "run")
    save_tokenizer(VQModel(TOKENIZER), folder / "tokenizer.safetensors", {"seed": 0})
    write_set(folder / "codes", (5, 0, 4), codebook_size=TOKENIZER.codebook_size)
    write_features(folder / "encoded")
    convert(folder / "run", "safetensors", folder / "weights.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    for name in ("made", "real"):
        save_npz(folder / f"{name}.npz", images.shape, [images], np.arange(6))
    (folder / "photos" / "a").mkdir(parents=True)
    Image.fromarray(images[0]).save(folder / "photos" / "a" / "0.png")
    return folder


class Box:
    """A fresh copy of the small world for each case; what the copy of the last case held is gone."""

    def __init__(self, whole: Path, folder: Path):
        self.whole, self.path = whole, folder / "box"
        folder.mkdir(exist_ok=True)
        self.checkpoint = self.path / "run" / "checkpoints" / f"step-{STEPS[-1]:08d}"

    def fresh(self) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        return Path(shutil.copytree(self.whole, self.path, symlinks=True))

    def variant(self, path: Path, data: bytes) -> None:
        """A fresh copy in which a file has other content."""
        relative = path.relative_to(self.path)
        self.fresh()
        (self.path / relative).write_bytes(data)

    def instead(self, path: Path, make: Callable[[Path], None]) -> None:
        """A fresh copy in which something else lies at ``path``."""
        relative = path.relative_to(self.path)
        self.fresh()
        (self.path / relative).unlink(missing_ok=True)
        make(self.path / relative)

    def run(self, tally: Tally, label: str, *words: object) -> fuzz.Outcome:
        outcome = fuzz.run([str(w) for w in words], self.path)
        tally.add(f"{label} / {' '.join(map(str, words))[:60]}", outcome)
        return outcome


@pytest.fixture
def box(whole: Path, tmp_path: Path) -> Iterator[Box]:
    box = Box(whole, tmp_path / "around")
    box.fresh()
    yield box
    shutil.rmtree(tmp_path / "around", ignore_errors=True)
