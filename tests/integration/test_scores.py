"""From a run folder to pictures, scores and a probe through the command line; and what is refused before training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.integration.conftest import TOKENIZER, megastar

pytestmark = pytest.mark.dist


def test_a_run_becomes_pictures_and_scores(world, whole, tmp_path):
    npz, grid = tmp_path / "samples.npz", tmp_path / "grid.png"
    words = ("sample", whole, "--count", 30, "--npz", npz, "--out", grid, "--seed", 3)
    megastar(*words)
    with np.load(npz) as archive:
        first, labels = archive["arr_0"], archive["arr_1"]
    assert first.shape == (30, 16, 16, 3) and first.dtype == np.uint8
    assert np.bincount(labels).tolist() == [10, 10, 10]
    assert Image.open(grid).size[0] > 16 * 10
    words = [tmp_path / "again.npz" if w == npz else w for w in words]
    megastar(*words, "--batch", 7)
    with np.load(tmp_path / "again.npz") as archive:
        apart = np.abs(first.astype(int) - archive["arr_0"])
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, (
        (apart > 0).sum((1, 2, 3)),
        apart.max(),
    )  # rounding of other shapes, no other codes

    scores = tmp_path / "scores.json"
    megastar("evaluate", npz, "--real", world.pictures, "--real-subset", "train", "--out", scores)
    result = json.loads(scores.read_text())
    assert result["metric"] == "FD-EffLite0" and result["value"] > 0 and result["floor"] > 0
    assert result["not_recorded"] == [] and result["provenance"]["trained"]["weights"] == "ema"
    assert any("5,000" in w or "5000" in w for w in result["warnings"])  # far too few pictures, and it says so

    probe = tmp_path / "probe.json"
    megastar("probe", whole, "--val-shards", world.codes("val"), "--block", 2, "--epochs", 3, "--out", probe)
    accuracy = json.loads(probe.read_text())["accuracy"]
    assert len(accuracy) == 8 and all(0 <= a <= 1 for a in accuracy)


def test_sets_that_number_their_classes_differently_are_refused(world, whole, tmp_path):
    """The same images with the folders' names in another order, as a list of names gives it."""
    names = tmp_path / "names.txt"
    names.write_text("stroke\ncircle\nsquare\n")
    source = ("pretokenize", world.pictures, "--tokenizer", world.tokenizer, "--shard-size", 9)
    turned = {split: tmp_path / split for split in ("train", "val")}
    for split, out in turned.items():
        megastar(*source, "--subset", split, "--out", out, "--classes", names)
    probe = ("--block", 2, "--epochs", 1, "--positions", 2, "--device", "cpu")
    done = megastar("probe", whole, "--val-shards", turned["val"], *probe, check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "number their classes differently: class 0 is 'circle' in the former" in said
    assert "and 'stroke' in the latter; pretokenize one of them again with --classes" in said
    assert "Traceback" not in said
    both = megastar("probe", whole, "--shards", turned["train"], "--val-shards", turned["val"], *probe)
    assert "was trained on other classes" in " ".join((both.stdout + both.stderr).split())
    like = ("--count", 4, "--device", "cpu", "--out", tmp_path / "x.png", "--like")
    done = megastar("sample", whole, *like, turned["val"], check=False)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2 and "class 0 is 'circle' in the former and 'stroke' in the latter" in said
    again = tmp_path / "again"  # the remedy
    megastar(*source, "--subset", "val", "--out", again, "--classes", world.codes("train"))
    done = megastar("probe", whole, "--val-shards", again, *probe)
    assert "images that it is fitted on" not in " ".join((done.stdout + done.stderr).split())
    done = megastar("probe", whole, "--val-shards", world.codes("train"), *probe)
    assert "the probe is scored on images that it is fitted on" in " ".join((done.stdout + done.stderr).split())
    megastar("sample", whole, *like, again)


def test_shards_of_another_tokenizer_are_refused_before_training(world, tmp_path):
    torch.manual_seed(1)
    save_tokenizer(VQModel(TOKENIZER), tmp_path / "other.safetensors", {"seed": 1})
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    done = megastar("train", config, f"data.tokenizer={tmp_path / 'other.safetensors'}", check=False)
    assert done.returncode == 2 and "another tokenizer" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_resume_on_other_shards_is_refused(world, whole, tmp_path):
    source = ("pretokenize", world.pictures, "--subset", "train", "--tokenizer", world.tokenizer)
    other = tmp_path / "codes"
    megastar(*source, "--out", other, "--shard-size", 9)
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=2)
    megastar("train", config)
    kept = world.codes("train").rename(world.folder / "kept")
    try:
        other.rename(world.codes("train"))
        done = megastar("train", config, "train.steps=4", check=False)
    finally:
        world.codes("train").rename(other)
        kept.rename(world.codes("train"))
    assert done.returncode == 2 and "holds different shards than" in done.stderr and "Traceback" not in done.stderr
