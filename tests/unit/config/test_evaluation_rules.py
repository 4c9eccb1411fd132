"""The rules of the section eval."""

from __future__ import annotations

import pytest

from megastar.config.rules.evaluation import evaluation_rules
from megastar.config.schema import RunConfig
from megastar.config.validate import find_problems

GOOD = {"every": 100}
CASES = [
    ({}, {"data.tokenizer": ""}, "eval.every = 100: data.tokenizer, which decodes the samples, is empty"),
    ({"metric": "fid"}, {}, "eval.metric = fid: eval.inception, the file of its network, is empty"),
    ({"metric": "fd_dinov2"}, {}, "eval.metric = fd_dinov2: eval.dinov2, the file of its network, is empty"),
    ({"dinov2": "x.pth"}, {}, "eval.dinov2 = x.pth: eval.metric fd does not use it"),
    ({"metric": "fid", "inception": "x.pth", "samples": 2048}, {}, "eval.samples = 2048: FID requires at least 2049"),
    ({"against_subset": "train"}, {}, "eval.against_subset = train: applies to eval.against, which is empty"),
    ({"cfg_scale": 1.5}, {"model.class_dropout_prob": 0.0}, "eval.cfg_scale = 1.5: guidance needs the null class"),
]


def configured(fields: dict, others: dict) -> RunConfig:
    cfg = RunConfig()
    cfg.data.tokenizer = "vq.safetensors"
    for name, value in (GOOD | fields).items():
        assert hasattr(cfg.eval, name)
        setattr(cfg.eval, name, value)
    for name, value in others.items():
        section, field = name.split(".")
        setattr(getattr(cfg, section), field, value)
    return cfg


@pytest.mark.parametrize(("fields", "others", "sentence"), CASES)
def test_each_problem_is_one_sentence(fields, others, sentence):
    (problem,) = evaluation_rules(configured(fields, others))
    assert problem.text.startswith(sentence) and "\n" not in problem.text
    assert not list(evaluation_rules(configured(fields | {"every": 0}, others)))  # without evaluations nothing is asked


def test_valid_sections_have_no_problem():
    assert not list(evaluation_rules(configured({}, {})))
    assert not list(evaluation_rules(configured({"metric": "fid", "inception": "x.pth", "cfg_scale": 1.5}, {})))


@pytest.mark.parametrize(
    ("name", "value"),
    [("every", -1), ("samples", 3), ("metric", "kid"), ("thresholds", [0.0]), ("weights", "x"), ("batch", 0)],
)
def test_bounds(name, value):
    assert any(f"eval.{name}" in p.fields for p in find_problems(configured({name: value}, {})))
