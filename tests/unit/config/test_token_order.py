"""The section token_order: what it sets, and its rules."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megastar.config.load import as_run_config, config_from_dict, load_compare_config, load_config, override_config
from megastar.config.schema import ModelConfig, RunConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.parallel.budget import elements, parameter_shapes

ROOT = Path(__file__).resolve().parents[3]
FIELDS = ["data.shards=codes", "self_guided.contrastive_block=3", "train.global_batch=64"]


def test_a_random_order_sets_the_networks_target_position():
    assert load_config(None, FIELDS).model.target_position == "none"
    assert load_config(None, [*FIELDS, "token_order.kind=random"]).model.target_position == "rotary"
    chosen = load_config(None, [*FIELDS, "token_order.kind=random", "model.target_position=embedding"])
    assert chosen.model.target_position == "embedding"
    made = as_run_config(override_config(load_config(None, FIELDS), ["token_order.kind=random"], "test"))
    assert made.model.target_position == "rotary" and "vocab_size" in made.model.unset  # still taken from the shards
    method = load_config(None, [*FIELDS, f"method={ROOT}/configs/method/random.yaml"])
    assert (method.token_order.kind, method.model.target_position, method.self_guided.enabled) == (
        "random",
        "rotary",
        False,
    )


def test_a_run_from_before_the_section_is_in_raster_order():
    old = asdict(load_config(None, FIELDS))
    del old["token_order"], old["model"]["target_position"], old["train"]["init_any_order"]
    assert config_from_dict(old) == load_config(None, FIELDS)


def test_a_variant_of_a_comparison_may_have_a_random_order(tmp_path):
    text = (ROOT / "configs/run/compare_emoji.yaml").read_text()
    path = tmp_path / "compare.yaml"
    path.write_text(
        text.replace("variants:\n", "variants:\n  random: {label: R, overrides: [token_order.kind=random]}\n")
    )
    cfg = load_compare_config(path)
    run = override_config(cfg.base, ["run=r", "data.shards=x", *cfg.variants["random"].overrides], "variant")
    assert (cfg.base.model.target_position, run.model.target_position) == ("none", "rotary")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (["token_order.kind=spiral"], "token_order.kind = spiral: must be raster or random"),
        (
            ["token_order.anneal_end=0.5"],
            "token_order.anneal_end = 0.5: applies to token_order.kind=random, but it is raster",
        ),
        (["model.target_position=rotary"], "model.target_position = rotary: is an input of random-order networks"),
        (
            ["token_order.kind=random", "token_order.anneal_start=0.8", "token_order.anneal_end=0.5"],
            "token_order.anneal_start = 0.8: must be at most token_order.anneal_end 0.5",
        ),
        (
            ["token_order.kind=random", "token_order.anneal_end=300"],
            "token_order.anneal_end = 300: must be at most 1, the end of the run; set token_order.anneal_unit=epochs",
        ),
        (["token_order.kind=random", "token_order.anneal_end=-1"], "token_order.anneal_end = -1.0: must be at least 0"),
        (["train.init_any_order=true"], "train.init_any_order = true: applies to train.init, which is empty"),
        (["model.order=random"], "unknown key model.order"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        load_config(None, [*FIELDS, *fields])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ar", "star", "repa", "star+repa", "random"])
def test_a_method_may_be_a_bare_word(name):
    path = load_config(None, [*FIELDS, f"method=configs/method/{name}.yaml"])
    assert load_config(None, [*FIELDS, f"method={name}"]) == path


def test_a_bare_word_that_is_no_method_or_a_file(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="method: configs/method/rpa.yaml does not exist: did you mean configs/method/repa"
    ):
        load_config(None, [*FIELDS, "method=rpa"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repa").write_text("optim: {lr: 0.5}")
    assert load_config(None, [*FIELDS, "method=repa"]).optim.lr == 0.5  # an existing file is a file


def test_epochs_may_be_any_number():
    cfg = load_config(
        None,
        [
            *FIELDS,
            "token_order.kind=random",
            "token_order.anneal_unit=epochs",
            "token_order.anneal_start=200",
            "token_order.anneal_end=300",
        ],
    )
    assert cfg.token_order.text == "random order, annealed from 200 to 300 epochs"
    assert load_config(None, [*FIELDS, "token_order.kind=random"]).token_order.text == "random order"


@pytest.mark.parametrize("head", [{}, {"head": "factorised", "head_factors": [128, 128]}])
def test_the_plan_counts_the_table(head):
    cfg = ModelConfig(n_layer=2, n_head=2, dim=64, image_tokens=64, target_position="rotary", **head)
    with torch.device("meta"):
        shapes = {f"transformer.{n}": tuple(p.shape) for n, p in Transformer(cfg).named_parameters()}
    assert list(parameter_shapes(cfg).items()) == list(shapes.items())  # in the module's order
    raster = elements(ModelConfig(n_layer=2, n_head=2, dim=64, image_tokens=64, **head), RunConfig().self_guided)
    assert sum(elements(cfg, RunConfig().self_guided).values()) - sum(raster.values()) == 64 * 64
