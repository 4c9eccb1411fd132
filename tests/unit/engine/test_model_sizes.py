"""Sizes of the model that the user has not set are those of the run folder, else of the shards."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from megastar.commands import plan, train
from megastar.config.load import as_run_config, config_from_dict, config_yaml, load_config, override_config
from megastar.config.model_sizes import SIZES_OF_DATA
from megastar.config.schema import ModelConfig, RunConfig
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.run_dir.config_file import claim_run_folder
from tests.checkpoints import save_model
from tests.unit.data.shards.test_shards import T, V, write_set

NANO = "configs/model/nano.yaml"
OF_SHARDS = (V, 4, T)  # vocab_size, num_classes, image_tokens


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "train", (7, 6, 8, 5))


def run_config(folder, *overrides: str, path=None) -> RunConfig:
    run = folder.parent / "run"
    return load_config(path, [f"data.shards={folder}", f"run={run}", "train.global_batch=8", *overrides])


def sizes(cfg: RunConfig) -> tuple[int, ...]:
    return tuple(getattr(cfg.model, name) for name in SIZES_OF_DATA)


@pytest.mark.parametrize("overrides", [[], [f"model={NANO}"], [f"model={NANO}", "model.dim=128"]])
def test_unset_sizes_are_those_of_the_shards(folder, overrides):
    cfg = run_config(folder, *overrides)
    assert cfg.model.unset == set(SIZES_OF_DATA)
    assert open_data(cfg).told == (
        f"model.vocab_size = {V}, model.num_classes = 4, model.image_tokens = {T}, from the manifest of {folder}",
    )
    assert sizes(cfg) == OF_SHARDS and not cfg.model.unset
    assert open_data(cfg).told == ()


def test_a_run_file(folder, tmp_path):
    """The file that ``model`` names is a size; fields beside it are the user's."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"base": NANO, "num_classes": 7}}))
    cfg = run_config(folder, path=path)
    assert cfg.model.unset == {"vocab_size", "image_tokens"} and sizes(cfg) == (2048, 7, 64)
    open_data(cfg)
    assert sizes(cfg) == (V, 7, T)
    path.write_text(yaml.safe_dump({"model": {"num_classes": 7}}))
    assert run_config(folder, f"model={NANO}", path=path).model.unset == set(SIZES_OF_DATA)
    assert run_config(folder, "model={num_classes: 9, dim: 768}", path=path).model.unset == {
        "vocab_size",
        "image_tokens",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=3", "the shards have 4 classes, model.num_classes is 3"),
        ("model.vocab_size=64", "the shards have 50 codes, model.vocab_size is 64"),
        ("model.image_tokens=64", "the shards have 16 tokens per image, a grid of 4, model.image_tokens is 64"),
    ],
)
def test_what_the_user_sets_is_kept_and_refused_if_it_contradicts(folder, override, message):
    with pytest.raises(UserError, match=message):
        open_data(run_config(folder, override))


def test_more_classes_than_the_shards_have(folder):
    cfg = run_config(folder, "model.num_classes=1000")
    open_data(cfg)
    assert cfg.model.num_classes == 1000


def test_python_sets_a_size(folder):
    cfg = run_config(folder)
    cfg.model.num_classes = 6
    assert cfg.model.unset == {"vocab_size", "image_tokens"}
    open_data(cfg)
    assert sizes(cfg) == (V, 6, T)
    built = RunConfig(model=ModelConfig())
    assert not built.model.unset and dataclasses.asdict(built.model).keys() == ModelConfig().__dict__.keys()


def test_copies_of_a_configuration(folder):
    cfg = run_config(folder, "model.num_classes=5")
    for other in (as_run_config(cfg), override_config(cfg, ["optim.lr=1e-3"], "x")):
        assert other.model.unset == {"vocab_size", "image_tokens"} and other.model.num_classes == 5
    assert override_config(cfg, ["model.vocab_size=8"], "x").model.unset == {"image_tokens"}
    assert not config_from_dict(dataclasses.asdict(cfg)).model.unset  # all of it was written down
    assert as_run_config({"model": {"vocab_size": 8}, "data": {"shards": "x"}}).model.unset == {
        "num_classes",
        "image_tokens",
    }


def test_what_a_run_recorded_wins(folder):
    """A run that began before sizes were taken has a table of 1000 classes, and goes on with it."""
    cfg = run_config(folder)
    older = run_config(folder, "model.num_classes=1000", f"model.vocab_size={V}", f"model.image_tokens={T}")
    claim_run_folder(older)
    told = open_data(cfg).told
    assert sizes(cfg) == (V, 1000, T) and told[0].endswith(f"from {cfg.run}/config.yaml")
    claim_run_folder(cfg)  # the same configuration
    recorded = yaml.safe_load((folder.parent / "run" / "config.yaml").read_text())
    assert recorded["model"]["num_classes"] == 1000
    with pytest.raises(UserError, match="model.num_classes: 1000 -> 4"):
        claim_run_folder(run_config(folder, "model.num_classes=4", f"model.vocab_size={V}", f"model.image_tokens={T}"))


def test_a_resumed_run_has_the_resolved_sizes(folder):
    first = run_config(folder)
    open_data(first)
    claim_run_folder(first)
    write_set(folder.parent / "other", (7, 6, 8, 5), classes=["a", "b", "c", "d", "e"])
    again = run_config(folder.parent / "other")
    with pytest.raises(UserError, match="the shards have 5 classes, model.num_classes is 4"):
        open_data(again)


def test_initial_weights_have_more_classes(folder, tmp_path):
    cfg = run_config(folder)
    small = ModelConfig(n_layer=1, n_head=1, dim=8, multiple_of=8, vocab_size=V, num_classes=30, image_tokens=T)
    save_model(tmp_path / "w.safetensors", Transformer(small).state_dict(), small, {})
    cfg.train.init = str(tmp_path / "w.safetensors")
    told = open_data(cfg).told
    assert sizes(cfg) == (V, 30, T)
    assert told[0] == f"model.num_classes = 30, from train.init = {cfg.train.init}"


def test_sizes_that_do_not_fit_the_rest(folder):
    cfg = run_config(folder, "self_guided.positions=20")
    with pytest.raises(UserError, match=r"model.image_tokens = 16, from the manifest of .*positions = 20: must be at"):
        open_data(cfg)


def test_print_config(folder, tmp_path, capsys, monkeypatch):
    """What is printed can be used as a run file."""
    words = [f"data.shards={folder}", f"run={folder.parent / 'run'}", "train.global_batch=8", "--print-config"]
    assert train.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        f"# model.vocab_size = {V}, model.num_classes = 4, model.image_tokens = {T}, from the manifest"
    )
    (tmp_path / "printed.yaml").write_text(text)
    cfg = load_config(tmp_path / "printed.yaml")
    assert sizes(cfg) == OF_SHARDS and not cfg.model.unset
    open_data(cfg)
    train.main([*words[1:], "data.shards=nowhere"])
    assert "num_classes = 1000, model.image_tokens = 256: defaults; training takes" in capsys.readouterr().out
    assert "unset" not in config_yaml(cfg)


def test_plan(folder, capsys):
    words = ["configs/run/demo.yaml", "--gpus", "1", "--json", f"run={folder.parent / 'run'}"]
    plan.main([*words, f"data.shards={folder}"])
    found = capsys.readouterr()
    assert f"model.vocab_size = {V}" in found.err and json.loads(found.out)


def test_a_size_that_is_no_field():
    with pytest.raises(UserError, match="unknown key model.unset"):
        load_config(None, ["model.unset=[]"])
