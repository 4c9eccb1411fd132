"""The sampler of a comparison's variants: parallel decoding, for all or for one, what is refused, and stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from megastar.checkpoint.convert import convert
from megastar.config.comparison import SampleConfig
from megastar.config.load import load_compare_config, save_config
from megastar.errors import UserError
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import changed_fields, plan_runs, take_sizes_of_codes
from megastar.experiments.results import Results
from megastar.experiments.samplers import options_of, recorded_sampler, sampler_of
from megastar.experiments.tables import description
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.checkpoints import write_checkpoint
from tests.integration.conftest import TOKENIZER
from tests.unit.data.shards.test_shards import write_set
from tests.unit.experiments.test_compare import small

RANDOM = "variants.random.overrides=[self_guided.enabled=false,token_order.kind=random{}]"
PARALLEL = ",sample.parallel_steps=4,sample.schedule=uniform"


def test_the_default_is_that_of_older_comparisons(tmp_path):
    cfg = small(tmp_path)
    assert sampler_of(cfg, "ar") is cfg.sample
    assert recorded_sampler(cfg.sample) == {
        "count": 2000, "like": "train", "cfg_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "batch": 64,
    }  # fmt: skip
    assert options_of(cfg.sample).recorded() == type(options_of(cfg.sample))().recorded()


def test_a_variant_may_decode_in_parallel(tmp_path):
    cfg = small(tmp_path, RANDOM.format(PARALLEL), "sample.cfg_scale=2")
    runs = {run.variant: run for run in plan_runs(cfg, 0)}
    assert (runs["random"].cfg.token_order.kind, runs["ar"].cfg.token_order.kind) == ("random", "raster")
    assert sampler_of(cfg, "ar") == SampleConfig(cfg_scale=2.0)
    assert sampler_of(cfg, "random") == SampleConfig(cfg_scale=2.0, parallel_steps=4, schedule="uniform")
    options = options_of(sampler_of(cfg, "random"))
    assert options.permutes and options.token_counts(16) == [4, 4, 4, 4]
    assert changed_fields(cfg, runs["random"])[-2:] == [
        "sample.parallel_steps: 0 -> 4",
        "sample.schedule: cosine -> uniform",
    ]
    assert not any("sample" in text for text in changed_fields(cfg, runs["star"]))
    cfg = small(tmp_path, RANDOM.format(",sample.schedule=diagonal"))
    assert plan_runs(cfg, 0) and options_of(sampler_of(cfg, "random")).token_counts(16) == [1, 2, 3, 4, 3, 2, 1]


def test_the_table_says_how_the_tokens_were_drawn(tmp_path):
    def said(*overrides):
        cfg = small(tmp_path, *overrides)
        return description(Results(cfg, plan_runs(cfg, 0), {}, 0))

    assert "temperature 1, against test" in said()
    one = said(RANDOM.format(PARALLEL), "variants.random.label=Any")
    assert "temperature 1, tokens drawn in 4 steps (uniform), random order for Any, against test" in one
    kinds = ("variants.ar.overrides=[token_order.kind=random]", "variants.star.overrides=[token_order.kind=random]")
    both = said(*kinds, "sample.parallel_steps=8", "sample.token_order=raster")
    assert "temperature 1, tokens drawn in 8 steps (cosine), raster order, against test" in both
    assert "tokens drawn in one diagonal per step," in said(*kinds, "sample.schedule=diagonal")
    assert "tokens drawn in random order, one by one," in said(*kinds, "sample.token_order=random")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sample.parallel_steps=4"], "variant ar: sample.parallel_steps 4: these weights were trained in raster order"),
        (["sample.token_order=random"], "variant ar: sample.token_order random: these weights were trained in raster order"),
        (["sample.schedule=uniform"], "sample.schedule = uniform: divides the tokens among sample.parallel_steps, which is 0"),
        (["sample.schedule=linear"], "sample.schedule = linear: must be cosine, uniform or diagonal"),
        (["sample.token_order=x"], "sample.token_order = x: must be auto, raster or random"),
        (["sample.parallel_steps=-1"], "sample.parallel_steps = -1: must be at least 0"),
        ([RANDOM.format(",sample.parallel_steps=17")], "variant random: sample.parallel_steps 17 must be at most 16"),
        ([RANDOM.format(",sample.parallel_steps=x")], "variant random: sample.parallel_steps = 'x': must be an integer"),
        ([RANDOM.format(",sample.schedule=uniform")], "variant random: sample.schedule = uniform: divides the tokens"),
        ([RANDOM.format(",sample.schedule=diagonal,sample.parallel_steps=4")], "4 x 4 tokens per step, 7 steps: leave it out"),
        (["sample.schedule=diagonal"], "variant ar: sample.schedule diagonal: these weights were trained in raster order"),
        ([RANDOM.format(",sample.parallel_step=4")], "variant random: unknown key sample.parallel_step"),
        ([RANDOM.format(",sample.cfg_scale=2")], "variants.random.overrides contains sample.cfg_scale=2, which is equal for all"),
    ],
)  # fmt: skip
def test_what_megastar_sample_refuses_is_refused(tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan_runs(small(tmp_path, *overrides), 0)


def test_steps_are_compared_with_the_tokens_of_the_codes(tmp_path, monkeypatch):
    """The number of tokens is unknown until the codes are made."""
    monkeypatch.chdir(tmp_path)
    cfg = small(tmp_path, RANDOM.format(",sample.parallel_steps=17"), "base.model.image_tokens=289")
    save_config(cfg, tmp_path / "whole.yaml")
    text = re.sub(r"\n +image_tokens: 289", "", (tmp_path / "whole.yaml").read_text())
    (tmp_path / "unset.yaml").write_text(text)
    cfg = load_compare_config(tmp_path / "unset.yaml")
    assert "image_tokens" in cfg.base.model.unset
    runs = plan_runs(cfg, 0)
    codes = Path(cfg.out) / "codes" / "train"
    codes.mkdir(parents=True)
    write_set(codes, (4,))
    with pytest.raises(UserError, match="variant random: sample.parallel_steps 17 must be at most 16"):
        take_sizes_of_codes(cfg, runs)


def test_images_are_drawn_in_parallel_and_stored_apart(tmp_path, monkeypatch):
    """Scores of a network of random order: those of parallel decoding differ from those token by token and have other files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/codes").mkdir(parents=True)
    write_set(tmp_path / "out/codes/train", (8,), codebook_size=TOKENIZER.codebook_size)
    for split in ("val", "test"):
        write_set(tmp_path / "out/codes" / split, (4,), codebook_size=TOKENIZER.codebook_size)
    save_tokenizer(VQModel(TOKENIZER), tmp_path / "tokenizer.safetensors", {"seed": 0})
    for i in range(4):
        (tmp_path / "pictures/test/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 200, 9)).save(tmp_path / f"pictures/test/a/{i}.png")
    common = (
        "base.data.tokenizer=tokenizer.safetensors",
        "curve.every=0",
        "sample.count=6",
        "base.model.num_classes=10",
    )

    def evaluation(text):
        cfg = small(tmp_path, RANDOM.format(text), *common)
        run = next(r for r in plan_runs(cfg, 0) if r.variant == "random")
        made = Evaluation(cfg)
        return made, run, next(p for p in made.parts(run) if p.what == "score")

    whole, run, part = evaluation("")
    write_checkpoint(run.folder, run.cfg, 1, 1, run.steps)
    save_config(run.cfg, run.folder / "config.yaml")
    convert(run.folder, "safetensors", tmp_path / "w.safetensors")
    files, scores = [], []
    for text in ("", ",sample.parallel_steps=4", PARALLEL):
        made, _, part = evaluation(text)
        files.append(made.file(part))
        scores.append(made.score(part, Console(quiet=True))["test"])
    assert len(set(files)) == 3 and whole.file(part) == files[0]
    assert len({s["value"] for s in scores}) == 3
    recorded = [json.dumps(s) for s in scores]
    assert "parallel_steps" not in recorded[0] and '"parallel_steps": 4' in recorded[1]
    assert '"schedule": "uniform"' in recorded[2]
