"""Comparisons without runs: rows drawn at random, and one whose evaluation has all input files."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from PIL import Image

from megastar.config.load import load_compare_config
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import plan_runs
from megastar.experiments.results import Results
from tests.unit.experiments.test_compare import small


@pytest.fixture(scope="module")
def planned():
    cfg = load_compare_config("configs/run/compare_emoji.yaml", ["weights=[ema]", "score.against=[test,train]"])
    return cfg, plan_runs(cfg, 0)


@pytest.fixture
def results(planned):
    """The shipped comparison's rows, drawn at random; one run is half done."""
    rng = np.random.default_rng(0)
    cfg, runs = deepcopy(planned)
    rows = {}
    for run in runs:
        scores = {
            s: {
                "metric": "FD-EffLite0",
                "value": 90.0,
                "scores": {"FD-EffLite0": float(rng.uniform(80, 90)), "KD-EffLite0": 0.0123},
            }
            for s in ("test", "train")
        }
        curve = {str(step): {"score": scores} for step in range(125, run.steps + 1, 125)}
        probe = {"accuracy": rng.uniform(0.2, 0.4, 8).tolist(), "positions": list(range(8, 65, 8))}
        rows[run.name] = {
            "variant": run.variant, "seed": run.seed, "steps": run.steps, "done": run.steps, "images": run.images,
            "sequences": run.sequences, "images_per_s": 100.0 / run.cfg.student_views, "val_loss_ar": float(rng.uniform(5, 6)),
            "step_cpu_ms_per_image": 10.0 * run.cfg.student_views, "train_seconds": 300.0, "train_cpu_s": 600.0,
            "weights": {"ema": {"probe": probe, "score": scores}}, "curve": curve,
        }  # fmt: skip
    rows["star-seed2"] |= {"done": 400, "weights": {}, "curve": {}}
    return Results(cfg, runs, rows, 0)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A comparison whose evaluation has all input files."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        (tmp_path / "out/codes" / split).mkdir(parents=True)
        (tmp_path / "out/codes" / split / "manifest.json").write_text(split)
    evaluation = Evaluation(small(tmp_path, "score.against=[test]", "base.data.tokenizer=tokenizer.bin"))
    (tmp_path / "tokenizer.bin").write_bytes(b"t")
    (tmp_path / "pictures/test/a").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures/test/a/1.png")
    return evaluation
