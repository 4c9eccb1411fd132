"""Weights that were trained without dropping labels: the embedding of the null class is untrained and is never used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import megastar
from megastar import cli
from megastar.checkpoint.convert import convert
from megastar.checkpoint.convert_weights import open_weights
from megastar.checkpoint.find_weights import find_weights, has_null_class
from megastar.checkpoint.source import open_source
from megastar.errors import UserError
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import plan_runs
from megastar.model.transformer import Transformer
from megastar.report.render_samples import RenderOptions, draw_missing, read_provenance
from megastar.run_dir.checkpoint_dir import find_checkpoint
from megastar.run_dir.layout import SAMPLES
from megastar.sampling.npz import record_of
from megastar.sampling.pipeline import check_guidance
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.checkpoints import full_weights, save_model, write_checkpoint
from tests.dist.reference import config
from tests.integration.conftest import TOKENIZER
from tests.unit.experiments.test_compare import small
from tests.unit.test_api import MODEL, NAMES
from tests.unit.test_api import TOKENIZER as CODES

CFG = config(data={"shards": "codes"}, model={"class_dropout_prob": 0.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("null") / "run"
    write_checkpoint(folder, CFG, 1, 1)
    return folder


def test_the_provenance_of_a_run_says_that_it_has_none(run, tmp_path):
    provenance = open_source(run).provenance("ema")
    assert provenance["null_class"] is False
    usual = replace(CFG.model, class_dropout_prob=0.1)
    for to, name, options in (("safetensors", "a.safetensors", {}), ("llamagen", "a.pt", {"config": usual})):
        convert(run, to, tmp_path / name)
        assert not has_null_class(open_weights(tmp_path / name, **options).provenance), to
    write_checkpoint(tmp_path / "usual", config(data={"shards": "codes"}), 1, 1)
    assert "null_class" not in open_source(tmp_path / "usual").provenance("ema")


def test_files_that_were_converted_before_are_recognized(run, tmp_path):
    file = tmp_path / "old.safetensors"
    save_model(file, full_weights(find_checkpoint(run), "ema"), CFG.model, {"weights": "ema", "step": 3})
    for source in (file, run):
        found = find_weights(source)
        with pytest.raises(UserError, match=r"has no null class .*which a probe needs"):
            found.require_null_class("a probe needs")
        with pytest.raises(UserError, match="guidance 2 is not possible"):
            check_guidance(found.provenance, 2.0)
        check_guidance(found.provenance, 1.0)


def test_features_and_guidance_are_refused(tmp_path):
    torch.manual_seed(0)
    model = replace(MODEL, class_dropout_prob=0.0)
    save_model(tmp_path / "w.safetensors", Transformer(model).state_dict(), model, {"classes": NAMES})
    save_tokenizer(VQModel(CODES), tmp_path / "tokenizer.safetensors", {}, torch.float32)
    loaded = megastar.load(tmp_path / "w.safetensors", tokenizer=tmp_path / "tokenizer.safetensors", device="cpu")
    with pytest.raises(UserError, match="no null class .*features need"):
        loaded.features(np.zeros((1, 16, 16, 3), np.uint8), block=1)
    with pytest.raises(UserError, match="guidance 3 is not possible"):
        loaded.sample(0)
    assert loaded.sample(0, cfg_scale=1.0).shape == (1, 16, 16, 3)
    out = tmp_path / "grid.png"
    words = ["sample", tmp_path / "w.safetensors", "--tokenizer", tmp_path / "tokenizer.safetensors", "--device", "cpu"]
    assert (
        cli.main(
            [str(w) for w in [*words, "--classes", "0", "--per-class", "1", "--npz", tmp_path / "s.npz", "--out", out]]
        )
        == 0
    )
    assert (
        json.loads(record_of(tmp_path / "s.npz").read_text())["identity"]["cfg_scale"] == 1.0
    )  # a grid is guided else


def test_a_report_draws_such_a_run_without_guidance(tmp_path):
    save_tokenizer(VQModel(TOKENIZER), tmp_path / "tokenizer.safetensors", {}, torch.float32)
    sizes = {"vocab_size": TOKENIZER.codebook_size, "image_tokens": 16, "num_classes": 3}
    for dropout, scale in ((0.0, 1.0), (0.1, 3.0)):
        cfg = config(
            data={"shards": "codes", "tokenizer": str(tmp_path / "tokenizer.safetensors")},
            model=sizes | {"class_dropout_prob": dropout},
        )
        run = tmp_path / f"run{dropout}"
        write_checkpoint(run, cfg, 1, 1)
        options = RenderOptions("ema", str(tmp_path / "tokenizer.safetensors"), None, "cpu", 1, 0)
        draw_missing(cfg, run, options, Console(quiet=True), "run")
        (grid,) = (run / SAMPLES).glob("*.png")
        assert read_provenance(grid)["cfg_scale"] == scale


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["base.model.class_dropout_prob=0"], "variant ar: model.class_dropout_prob = 0 .*the probe of each run needs"),
        (["variants.star.overrides=[model.class_dropout_prob=0]"], "variant star: model.class_dropout_prob = 0"),
        (["base.model.class_dropout_prob=0", "sample.cfg_scale=2"], r"and guidance \(sample.cfg_scale = 2\) needs"),
    ],
)
def test_a_comparison_of_such_runs_is_refused(tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_runs(small(tmp_path, *overrides), 0)


def test_a_comparison_does_not_probe_such_weights(tmp_path):
    """Weights of a run that an older version planned."""
    cfg = small(tmp_path)
    run = plan_runs(cfg, 0)[0]
    evaluation = Evaluation(cfg)
    part = evaluation.parts(run)[0]
    write_checkpoint(run.folder, CFG, 1, 1, step=part.step)
    with pytest.raises(UserError, match=r"no null class .*which a probe needs"):
        evaluation.probe(part, Console(quiet=True))
