"""Codes that exist before a comparison, or a variant of it, begins: whether its runs can read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from megastar.cli import main
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from megastar.experiments.codes import check_codes, check_stored_features, features_to_make
from megastar.experiments.comparison import Comparison
from megastar.experiments.plan import plan_runs
from tests.unit.data.shards.test_shards import T, V, write_set
from tests.unit.experiments.test_compare import small, trained

SIZES = [f"base.model.image_tokens={T}", f"base.model.vocab_size={V}", "base.model.num_classes=4"]
REPA = "variants.repa.overrides=[repa.enabled=true]"
STORED = {
    "encoder": "efflite0",
    "weights_sha256": "a" * 64,
    "layer": "block 10",
    "grid": 3,
    "width": 7,
    "dtype": "float16",
}


def write_codes(folder: Path, **features: object) -> None:
    """Codes in the place of a comparison's, which record ``features``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_set(folder, (7, 6))
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    if features:
        record["features"] = {**STORED, "grid": record["grid"], "pool": 1, **features}
    path.write_text(json.dumps(record))


def checked(tmp_path: Path, *overrides: str) -> None:
    cfg = small(tmp_path, *SIZES, *overrides)
    check_stored_features(cfg, plan_runs(cfg, 0))


def test_an_added_variant_needs_features_that_the_codes_store(tmp_path):
    """Its runs would end when they start; with new codes, the trained runs would no longer belong to them."""
    codes = tmp_path / "out/codes/train"
    write_codes(codes)
    checked(tmp_path)
    sentence = re.escape(
        f"variant repa: data.shards = {codes} stores no features, which repa.enabled needs: choose another out=..., compute "
        "them in training (repa.online), or set repa.enabled=false"
    )
    with pytest.raises(UserError, match=sentence):
        checked(tmp_path, REPA)
    cfg = small(tmp_path, *SIZES, REPA)
    runs = plan_runs(cfg, 0)
    with pytest.raises(UserError, match=sentence):
        Comparison(cfg, runs, 0, "", Console(quiet=True)).run()
    assert not (tmp_path / "out/compare.yaml").exists() and not (tmp_path / "out/plan").exists()
    online = "[repa.enabled=true,repa.online=true,repa.encoder=efflite0,repa.pictures=pictures]"
    checked(tmp_path, f"variants.repa.overrides={online}")
    checked(tmp_path, "variants.repa.overrides=[repa.enabled=true,repa.weight=0]")
    for run in runs:  # as by an earlier version: what is trained is still measured
        trained(run, 8)
    checked(tmp_path, REPA)


def test_the_dry_run_tells_it_too(tmp_path, capsys):
    small(tmp_path)
    write_codes(tmp_path / "out/codes/train")
    words = ["compare", str(tmp_path / "compare.yaml"), *SIZES, "--dry-run"]
    assert main(words) == 0
    assert main([*words, REPA]) == 2
    assert "variant repa: data.shards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ("repa.encoder=mine:encoder", "repa.encoder = mine:encoder, but data.shards = .* has features of efflite0 .*: name that encoder, or choose another out=... and codes=..., or compute the features in training"),
        ("repa.width=9", "repa.width = 9, but .*: set it to 7, or to 0"),
        ("repa.encoder=mine:encoder,repa.encoder_weights=none.pth", "repa.encoder_weights = none.pth does not exist"),
    ],
)  # fmt: skip
def test_features_of_another_encoder_are_refused(tmp_path, own, sentence):
    encoder = "mine:encoder" if "weights" in own else "efflite0"
    write_codes(tmp_path / "codes/train", encoder=encoder)
    codes = f"codes={tmp_path / 'codes'}"
    checked(tmp_path, REPA, codes)
    with pytest.raises(UserError, match=f"variant repa: {sentence}"):
        checked(tmp_path, f"variants.repa.overrides=[repa.enabled=true,{own}]", codes)


def test_the_validation_codes_have_the_features_of_the_training_codes(tmp_path):
    validated = [REPA, "base.train.val_every=4"]
    val, train = (tmp_path / f"out/codes/{split}" for split in ("val", "train"))
    write_codes(val, encoder="mine:encoder")
    with pytest.raises(UserError, match="variant repa: repa.encoder = efflite0, but .* has features of mine:encoder"):
        checked(tmp_path, *validated)  # those of train would be of efflite0
    write_codes(train, encoder="efflite0")
    with pytest.raises(UserError, match="make both with the same encoder"):
        checked(tmp_path, *validated)
    checked(tmp_path, REPA)  # no run reads val
    write_codes(val)
    checked(tmp_path, *validated)
    cfg = small(tmp_path, *SIZES, *validated)
    runs = plan_runs(cfg, 0)
    made = {split: features_to_make(cfg, runs, split) for split in ("train", "val", "test")}
    assert made == {"train": ("efflite0", ""), "val": ("efflite0", ""), "test": ("", "")}
    write_codes(train, encoder="dinov2")  # which repa.encoder, empty, accepts
    assert features_to_make(cfg, runs, "val") == ("", "")


def test_codes_that_no_run_can_read_are_refused_before_one_starts(tmp_path):
    codes = tmp_path / "codes"
    write_codes(codes / "train")
    stored = load_manifest(codes / "train")
    cfg = small(tmp_path, *SIZES, f"codes={codes}")
    check_codes(cfg, plan_runs(cfg, 0))
    record = json.loads((codes / "train/manifest.json").read_text())
    many = f"variants.ar.overrides=[self_guided.enabled=false,self_guided.baseline_views={stored.views + 1}]"
    for override, sentence in (
        (many, f"variant ar, data.shards = .*{stored.views + 1} views are requested, the shards store {stored.views}"),
        ("base.model.vocab_size=99", "variant .*model.vocab_size is 99"),
        ("base.train.global_batch=64", "holds 13 samples, fewer than one global batch of 64"),
    ):
        other = small(tmp_path, *SIZES, f"codes={codes}", override)
        with pytest.raises(UserError, match=sentence):
            check_codes(other, plan_runs(other, 0))
    assert record == json.loads((codes / "train/manifest.json").read_text())
