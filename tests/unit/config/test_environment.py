"""Environment variables in a configuration: used by value, recorded by name."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from megastar.config.env_text import EnvText, recorded
from megastar.config.files import read_yaml
from megastar.config.load import (
    as_run_config,
    config_from_dict,
    config_yaml,
    diff_configs,
    load_compare_config,
    load_config,
    override_config,
)
from megastar.errors import UserError
from megastar.model.io import metadata_of
from megastar.run_dir.config_file import changes_since, claim_run_folder
from megastar.run_dir.status import status_of

FILE = """
run: {run}
data:
  shards: /data/${{oc.env:MEGASTAR_T_SECRET}}/codes
  val_shards: ${{data.shards}}
  cache: ${{oc.env:MEGASTAR_T_CACHE,/tmp/c}}
train:
  steps: ${{oc.decode:${{oc.env:MEGASTAR_T_STEPS,7}}}}
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASTAR_T_SECRET", "hunter2")
    (tmp_path / "run.yaml").write_text(FILE.format(run=tmp_path / "run"))
    return tmp_path / "run.yaml"


def test_the_value_is_used_and_the_expression_recorded(path, monkeypatch):
    overrides = ["data.tokenizer=${oc.env:MEGASTAR_T_SECRET}.st", "train.upload=s3://${oc.env:MEGASTAR_T_SECRET}/x"]
    cfg = load_config(path, overrides)
    assert (cfg.data.shards, cfg.data.val_shards) == ("/data/hunter2/codes",) * 2
    assert (cfg.data.cache, cfg.data.tokenizer, cfg.train.steps) == ("/tmp/c", "hunter2.st", 7)
    for again in (cfg, override_config(cfg, ["train.steps=9"], "x"), replace(cfg), as_run_config(cfg)):
        text = config_yaml(again)
        assert "hunter2" not in text and "hunter2" not in repr(recorded(asdict(again)))
        assert (
            "shards: /data/${oc.env:MEGASTAR_T_SECRET}/codes" in text
            and "cache: ${oc.env:MEGASTAR_T_CACHE,/tmp/c}" in text
        )
        assert text.count("${oc.env:MEGASTAR_T_SECRET}") == 4
    (path.parent / "again.yaml").write_text(config_yaml(cfg))
    assert load_config(path.parent / "again.yaml") == cfg
    assert config_from_dict(recorded(asdict(cfg))) == cfg
    other = load_config(path, ["data.shards=/elsewhere"])
    assert diff_configs(cfg, other, ["data.val_shards", "data.tokenizer", "train"]) == [
        "data.shards: /data/${oc.env:MEGASTAR_T_SECRET}/codes -> /elsewhere"
    ]
    assert as_run_config({"run": "r", "data": {"shards": "${oc.env:MEGASTAR_T_SECRET}"}}).data.shards == "hunter2"


def test_a_run_resumes_with_another_value_and_is_read_without_one(path, monkeypatch):
    cfg = load_config(path)
    claim_run_folder(cfg)
    config = path.parent / "run" / "config.yaml"
    assert "hunter2" not in config.read_text()
    monkeypatch.setenv("MEGASTAR_T_SECRET", "rotated")
    claim_run_folder(load_config(path))
    monkeypatch.delenv("MEGASTAR_T_SECRET")
    assert status_of(path.parent / "run").state == "new"
    assert read_yaml(config, lenient=True)["data"]["shards"] == "/data/${oc.env:MEGASTAR_T_SECRET}/codes"
    assert isinstance(config_from_dict(recorded(asdict(cfg))).data.shards, EnvText)
    with pytest.raises(
        UserError, match=r"run.yaml cannot be read \(.*Environment variable 'MEGASTAR_T_SECRET' not found"
    ):
        load_config(path)


@pytest.mark.parametrize(
    "text, overrides, shards, expression",
    [
        ("data: {shards: '${oc.env:${oc.env:MEGASTAR_T_NAME}}'}", [], "hunter2", "${oc.env:${oc.env:MEGASTAR_T_NAME}}"),
        ("data: {shards: '${oc.env:NOT_SET,${oc.env:MEGASTAR_T_SECRET}}'}", [], "hunter2", None),
        ("data: {shards: \"${oc.env:NOT_SET,'a, b}'}\"}", [], "a, b}", None),
        ("data: {shards: '${oc.decode:${oc.env:MEGASTAR_T_NUMBER}}'}", [], "7", "${oc.env:MEGASTAR_T_NUMBER}"),
        (
            "data: {shards: '${oc.${model.name}:MEGASTAR_T_SECRET}'}\nmodel: {name: env}",
            [],
            "hunter2",
            "${oc.env:MEGASTAR_T_SECRET}",
        ),
        ("run: ${oc.env:MEGASTAR_T_SECRET}", ["data.shards=${run}"], "hunter2", "${oc.env:MEGASTAR_T_SECRET}"),
        ("run: a", ["data.shards=${oc.env:MEGASTAR_T_SECRET}/${run}"], "hunter2/a", "${oc.env:MEGASTAR_T_SECRET}/a"),
    ],
)
def test_indirect_uses_are_recorded_as_expressions_too(tmp_path, monkeypatch, text, overrides, shards, expression):
    for name, value in {"SECRET": "hunter2", "NAME": "MEGASTAR_T_SECRET", "NUMBER": "7"}.items():
        monkeypatch.setenv(f"MEGASTAR_T_{name}", value)
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    path.write_text(text)
    cfg = load_config(path, overrides)
    again.write_text(config_yaml(cfg))
    assert cfg.data.shards == shards and "hunter2" not in again.read_text()
    assert load_config(again) == cfg
    assert expression in (None, recorded(cfg.data.shards))


@pytest.mark.parametrize(
    "text",
    [
        "data: '${oc.decode:${oc.env:MEGASTAR_T_TREE}}'",
        "data: {shards: '${oc.decode:${oc.env:MEGASTAR_T_TREE}}'}",
        "data: {shards: '${oc.create:${oc.env:MEGASTAR_T_TREE}}'}",
        "data: {shards: '${${oc.env:MEGASTAR_T_FIELD}}'}",
        "data: {shards: a}\ntrain: {seed: '${oc.env:MEGASTAR_T_TREE}'}",
        "data: {shards: a}\ntrain: {dtype: '${oc.env:MEGASTAR_T_TREE}'}",
        "data: {shards: a}\nmodel: {n_layer: '${oc.env:MEGASTAR_T_TREE}'}",
    ],
)
def test_a_variable_of_a_wrong_kind_is_one_sentence_without_its_value(tmp_path, monkeypatch, text):
    monkeypatch.setenv("MEGASTAR_T_TREE", "{hunter2: [hunter2]}")
    monkeypatch.setenv("MEGASTAR_T_FIELD", "run")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "run.yaml")
    assert "hunter2" not in str(refused.value)


def test_variants_of_a_comparison_keep_the_expressions(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASTAR_T_SECRET", "hunter2")
    (tmp_path / "c.yaml").write_text(
        "pictures: p\nbase: {data: {shards: a}, train: {steps: 1}}\nvariants: {one: {overrides: ['data.shards=${oc.env:MEGASTAR_T_SECRET}']}}"
    )
    (variant,) = load_compare_config(tmp_path / "c.yaml", ["out=o"]).variants.values()
    cfg = override_config(as_run_config({"data": {"shards": "a"}}), variant.overrides, "x")
    assert cfg.data.shards == "hunter2" and "hunter2" not in config_yaml(cfg)


def test_a_resumed_run_reports_changes_as_expressions(path):
    cfg = load_config(path)
    before = recorded(asdict(cfg))
    assert changes_since(before, cfg) == [] and changes_since(asdict(cfg), cfg) == []
    before["data"]["shards"] = "/other"
    assert changes_since(before, cfg) == ["data.shards /other -> /data/${oc.env:MEGASTAR_T_SECRET}/codes"]


def test_weights_files_and_states_hold_no_values(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASTAR_T_SECRET", "hunter2")
    cfg = as_run_config({"data": {"shards": "a"}, "model": {"name": "${oc.env:MEGASTAR_T_SECRET}"}})
    assert "hunter2" not in metadata_of(cfg.model, {})["megastar"]
