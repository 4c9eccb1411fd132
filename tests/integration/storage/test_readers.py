"""Evaluations, probes and class counts read shards on S3 with the cache and patience of their run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megastar.checkpoint.find_weights import find_weights, labels_of
from megastar.config.schema import DataConfig
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from megastar.evaluation.image_sources import open_images
from megastar.evaluation.linear_probe import load_crops
from tests.integration.conftest import megastar
from tests.integration.helpers.s3 import client_of, free_port
from tests.integration.storage.test_store import cached, upload
from tests.integration.test_train import rows

pytestmark = pytest.mark.dist


@pytest.fixture
def places(s3, use_s3, world) -> dict[str, str]:
    use_s3(s3)
    for split in ("train", "val"):
        upload(client_of(s3), world.codes(split), "codes", f"readers/{split}")
    return {split: f"s3://codes/readers/{split}" for split in ("train", "val")}


def tars(*folders: Path) -> list[str]:
    return sorted(f"{shard.sha256}.tar" for folder in folders for shard in load_manifest(folder).shards)


@pytest.fixture
def default(monkeypatch, tmp_path) -> Path:
    """The folder of the default cache."""
    folder = tmp_path / "default"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_scheduled_evaluations_a_probe_and_samples_of_a_run(places, world, default, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    config = world.write_config(tmp_path / "run.yaml", run, steps=4, val_every=0)
    words = [f"data.shards={places['train']}", "data.val_shards=", f"data.cache={cache}"]
    evaluated = ["eval.every=4", "eval.samples=4", "eval.batch=4"]
    megastar("train", config, *words, *evaluated)
    assert "eval_fd" in rows(run)[4]
    assert cached(DataConfig(cache=str(cache))) == tars(world.codes("train")) and not list(default.rglob("*.tar"))
    assert find_weights(run).data.cache == str(cache)
    probe = ["--block", 1, "--positions", 2, "--epochs", 1, "--device", "cpu"]
    megastar("probe", run, "--val-shards", places["val"], *probe)
    sheet = ["--count", 4, "--device", "cpu", "--out", tmp_path / "x.png", "--tokenizer", world.tokenizer]
    megastar("sample", run, "--like", places["val"], *sheet)
    assert cached(DataConfig(cache=str(cache))) == tars(world.codes("train"), world.codes("val"))
    assert not list(default.rglob("*.tar"))


def test_readers_take_a_cache_and_a_patience(places, world, default, tmp_path, use_s3):
    data = DataConfig(cache=str(tmp_path / "cache"), patience=60)
    local = open_images(world.codes("train"), tokenizer=world.tokenizer)
    images = open_images(places["train"], tokenizer=world.tokenizer, data=data)
    assert all((a == b).all() for a, b in zip(local.batches(8), images.batches(8), strict=True))
    assert labels_of(places["train"], data) == labels_of(world.codes("train"))
    for a, b in zip(load_crops(places["val"], 2, data=data), load_crops(world.codes("val"), 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cached(data) == tars(world.codes("train"), world.codes("val")) and not list(default.rglob("*.tar"))
    use_s3(f"http://127.0.0.1:{free_port()}")  # nothing listens there
    short = DataConfig(cache=data.cache, patience=0.5)
    with pytest.raises(UserError, match="train"):
        open_images(places["train"], tokenizer=world.tokenizer, data=short)
    with pytest.raises(UserError, match="train"):
        load_crops(places["train"], data=short)
