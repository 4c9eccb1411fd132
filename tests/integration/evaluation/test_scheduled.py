"""Scheduled evaluations of a run: their scores, and that they change nothing of the training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megastar.checkpoint.find_weights import find_weights
from megastar.checkpoint.rng_state import random_file
from megastar.evaluation.options import Settings
from megastar.evaluation.runner import sample_and_evaluate
from megastar.run_dir.evaluations import read_evaluations
from megastar.run_dir.events import read_events
from megastar.sampling.distributed import labels_like
from megastar.sampling.grid import Block, image_grid
from megastar.sampling.pipeline import open_pipeline
from tests.checkpoints import full_weights
from tests.integration.conftest import megastar
from tests.integration.test_train import rows

pytestmark = [pytest.mark.dist, pytest.mark.long]
EVERY, SAMPLES = 5, 20
MESHES = {
    "one rank": (1, ["parallel.deepspeed=zero1"]),
    "ZeRO 1": (2, ["parallel.deepspeed=zero1"]),
    "ZeRO 3": (2, ["parallel.deepspeed=zero3"]),
    "TP 2": (2, ["parallel.deepspeed=zero1", "parallel.tensor_parallel=2"]),
}
EVALUATED = [f"eval.every={EVERY}", f"eval.samples={SAMPLES}", "eval.batch=4", "eval.thresholds=[1e9,1e-9]"]


def scores(run: Path) -> dict[int, dict]:
    """Step -> the evaluation's values in metrics.jsonl."""
    return {s: {k: v for k, v in r.items() if k.startswith("eval_")} for s, r in rows(run).items() if "eval_fd" in r}


def training(run: Path) -> dict[int, dict]:
    """Step -> all other values, without the validation's."""
    return {
        s: {k: v for k, v in r.items() if not k.startswith("eval_") and k != "val_loss_ar"}
        for s, r in rows(run).items()
    }


@pytest.fixture(scope="module", params=MESHES)
def runs(request, world, tmp_path_factory):
    """A run with neither, one with validation, one with both, on one mesh."""
    ranks, parallel = MESHES[request.param]
    folder = tmp_path_factory.mktemp("scheduled")
    cases = {"neither": ["train.val_every=0"], "validated": [], "evaluated": EVALUATED}
    if request.param not in ("one rank", "ZeRO 3"):
        del cases["validated"]
    for name, words in cases.items():
        config = world.write_config(folder / f"{name}.yaml", folder / name)
        megastar("train", config, *parallel, *words, ranks=ranks)
    return folder


def test_training_is_equal_to_the_last_bit(runs):
    plain = runs / "neither"
    for name in sorted(p.name for p in runs.iterdir() if p.is_dir() and p != plain):
        assert training(runs / name) == training(plain)
        last = "checkpoints/step-00000012"
        for kind in ("student", "ema"):
            a, b = full_weights(plain / last, kind), full_weights(runs / name / last, kind)
            assert all(torch.equal(a[k], b[k]) for k in a)
        for file in (plain / last).glob(random_file(0).replace("00000", "*")):
            a, b = torch.load(file), torch.load(runs / name / last / file.name)
            assert torch.equal(a["torch"], b["torch"])
        assert {s for s, r in rows(runs / name).items() if "val_loss_ar" in r} == {6, 12}


def test_scores_are_those_of_the_checkpoint(runs, world):
    """Of the same weights sampled by the pipeline of `megastar sample`, and scored as there."""
    run = runs / "evaluated"
    found = scores(run)
    assert sorted(found) == [5, 10, 12]
    assert found[12]["eval_epoch"] == pytest.approx(12 * 8 / 27) and found[12]["eval_samples"] == SAMPLES
    assert found[12]["eval_weights"] == "ema" and found[12]["eval_cfg_scale"] == 1
    record = read_evaluations(run)[-1]
    assert record["step"] == 12 and record["labels"] == "like the training shards"
    assert record["reference"]["pictures"] == 27 and record["features"]["recipe"]
    labels = labels_like([c for c in range(3) for _ in range(9)], SAMPLES, 0)  # 9 images of each class
    weights = find_weights(run / "checkpoints/step-00000012", "ema")
    pipeline = open_pipeline(weights, world.tokenizer, labels, seed=0, device="cpu", batch=4)
    options = {"real_tokenizer": world.tokenizer, "settings": Settings(), "metrics": ["fd"]}
    result = sample_and_evaluate(pipeline, world.codes("train"), **options)
    assert result["value"] == pytest.approx(found[12]["eval_fd"], rel=1e-6)
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"eval-{step:08d}.png" for step in (5, 10, 12)]
    images = pipeline.sample_chunk(0)  # as large as a batch
    caption = "4 samples of the ema weights, step 12, cfg_scale 1"
    names, columns = ["circle", "square", "stroke"], max(Counter(labels[:4]).values())
    wanted = image_grid([Block(caption, images, labels[:4])], names, columns=columns)
    with Image.open(run / "samples/eval-00000012.png") as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(wanted))
        assert json.loads(grid.text["megastar"])["caption"] == caption


def test_events_and_status_report_them(runs):
    run = runs / "evaluated"
    events = [e for e in read_events(run) if e["event"] == "evaluated"]
    assert [e["step"] for e in events] == [5, 10, 12]
    assert "FD-EffLite0" in events[-1]["text"] and "20 samples of the ema weights" in events[-1]["text"]
    assert "<= 1e+09 at epoch 1.481; <= 1e-09 not yet" in events[-1]["text"]
    status = json.loads(megastar("status", run, "--json").stdout)
    assert "FD-EffLite0" in status["evaluation"] and "<= 1e+09 at epoch 1.481; <= 1e-09 not yet" in status["evaluation"]
    assert status["epochs_to"] == {"1e+09": pytest.approx(40 / 27, rel=1e-5), "1e-09": None}
