"""Damaged and foreign states of a tokenizer's training: one sentence; environment variables stay out of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megastar.config.env_text import EnvText
from megastar.errors import UserError
from megastar.tokenizer.train import TokenizerTrainer
from tests.fuzz import byte_variants, random
from tests.unit.tokenizer.test_tokenizer import _batch, _config, _trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("state") / "last.pt"
    _trainer(_config()).save(path)
    return path.read_bytes()


WRONG = {
    "no config": {"config": None}, "a list": {"config": [1]}, "text as a step": {"step": "[/]"}, "step": {"step": -1},
    "float": {"step": 1.5}, "uses": {"uses": torch.zeros(3)}, "huge uses": {"uses": torch.zeros(1).expand(10**12)},
    "no uses": {"uses": None}, "dead": {"dead": 10.0}, "rng": {"rng": torch.zeros(3)}, "no rng": {"rng": "x"},
    "model": {"model": {}}, "model of another size": {"model": {"a": torch.zeros(1)}}, "a model": {"model": [1]},
    "pictures": {"pictures": [1]}, "facts": {"pictures": {"count": 3}},
    "optimizer": {"optimizer": {"state": {}, "param_groups": []}}, "an optimizer": {"optimizer": 5},
}  # fmt: skip


@pytest.mark.parametrize("label", WRONG)
def test_values_that_are_wrong(tmp_path, saved, label):
    (tmp_path / "whole.pt").write_bytes(saved)
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    torch.save(state | WRONG[label], tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is damaged .*: restore it, or remove it to start again"):
        _trainer(_config()).load(tmp_path / "last.pt")


def test_damaged_bytes(tmp_path, saved):
    trainer = _trainer(_config())
    for _, data in byte_variants(saved, random.Random("state"), 60):
        (tmp_path / "last.pt").write_bytes(data)
        try:
            trainer.load(tmp_path / "last.pt")
        except UserError as error:
            assert "last.pt is damaged" in str(error) and len(str(error)) < 500


def test_an_environment_variable_is_not_in_the_state_and_it_resumes(tmp_path):
    name = EnvText("hunter2", "${oc.env:SECRET}")
    cfg = replace(_config(), pictures=name, subset=name)
    trainer = TokenizerTrainer(cfg, torch.device("cpu"), torch.float32, _batch)
    trainer.save(tmp_path / "last.pt")
    assert b"hunter2" not in (tmp_path / "last.pt").read_bytes()
    trainer.load(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"another configuration \(subset: \$\{oc.env:SECRET\} -> other\)"):
        TokenizerTrainer(replace(cfg, subset="other"), torch.device("cpu"), torch.float32, _batch).load(
            tmp_path / "last.pt"
        )
