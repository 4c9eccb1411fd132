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
    load_config,
    override_config,
)
from megastar.errors import UserError
from megastar.run_dir.config_file import claim_run_folder
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
