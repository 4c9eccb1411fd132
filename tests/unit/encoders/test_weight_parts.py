"""Encoders whose weights are in several files, with an index."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from megastar.encoders.dinov3 import load
from megastar.encoders.spatial import DinoPatches
from megastar.errors import UserError
from megastar.utils.files import sha256
from megastar.utils.weights.weight_parts import weights_sha256
from tests.unit.encoders.test_dinov3 import random_state, to_hugging_face

INDEX = "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A network in one file, whole.safetensors, and in two."""
    state = to_hugging_face(random_state(blocks=2))
    save_file(state, tmp_path / "whole.safetensors")
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(PARTS, halves, strict=True):
        save_file({name: state[name] for name in half}, tmp_path / file, {"format": "pt"})
    index = {name: file for file, half in zip(PARTS, halves, strict=True) for name in half}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return tmp_path


def test_two_files_are_the_network_of_one(folder):
    whole, parts = load(folder / "whole.safetensors"), load(folder / INDEX)
    assert whole.shape == parts.shape and whole.state_dict().keys() == parts.state_dict().keys()
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())


def test_the_hash_is_that_of_all_files(folder):
    lines = "".join(f"{name} {sha256(folder / name)}\n" for name in PARTS)
    assert DinoPatches("dinov3", folder / INDEX).weights_sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert weights_sha256(folder / "whole.safetensors") == sha256(folder / "whole.safetensors")
    data = bytearray((folder / PARTS[1]).read_bytes())
    data[-1] ^= 1
    (folder / PARTS[1]).write_bytes(data)
    assert weights_sha256(folder / INDEX) != hashlib.sha256(lines.encode()).hexdigest()


def one_part(folder):
    return folder / PARTS[
        0
    ], rf"is one of 2 files of a network: name {re.escape(str(folder / INDEX))}, with all of them"


def missing(folder):
    (folder / PARTS[1]).unlink()
    return folder / INDEX, r"00002.safetensors does not exist, although .* names it \(1 of 2 files are missing\)"


def of_another(folder):
    save_file({"other": torch.zeros(2)}, folder / PARTS[1])
    return (
        folder / INDEX,
        r"does not hold the tensors that .* records \(the first that differs: .*\): download both again",
    )


def empty(folder):
    (folder / INDEX).write_text('{"weight_map": {}}')
    return folder / INDEX, "names no weights: download it again"


def elsewhere(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": "../whole.safetensors"}}')
    return folder / INDEX, "is damaged: .*download it again"


@pytest.mark.parametrize("damage", [one_part, missing, of_another, empty, elsewhere])
def test_wrong_files_are_refused_in_one_sentence(folder, damage):
    path, sentence = damage(folder)
    with pytest.raises(UserError, match=sentence) as error:
        load(path)
    assert "\n" not in str(error.value)
