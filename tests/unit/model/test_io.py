"""Weights files: what is written is read, and every wrong file has its sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import load_model, read_model_metadata
from megastar.model.transformer import Transformer
from tests.checkpoints import save_model


def small(**changes) -> ModelConfig:
    known = {"name": "t", "n_layer": 2, "n_head": 2, "dim": 16, "multiple_of": 8, "vocab_size": 12}
    return ModelConfig(**known | {"num_classes": 3, "image_tokens": 9} | changes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Transformer(small())
    torch.nn.init.normal_(made.output.weight)
    return made.eval()


def test_roundtrip_is_exact_and_frozen(model, tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    save_model(path, model.state_dict(), model.cfg, {"command": "train", "steps": 7, "scores": {"fd": 1.5}})
    before = torch.get_rng_state()
    loaded, provenance = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert provenance == {"command": "train", "steps": 7, "scores": {"fd": 1.5}}
    assert loaded.cfg == model.cfg and not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    labels, tokens = torch.tensor([0, 3]), torch.randint(12, (2, 8))
    assert torch.equal(loaded(labels, tokens).logits, model(labels, tokens).logits)


def test_dtype_of_file_and_of_loaded_model(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, {k: v.bfloat16() for k, v in model.state_dict().items()}, model.cfg, {})
    with safe_open(path, "pt") as f:
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}  # noqa: SIM118
    loaded, _ = load_model(path)
    assert loaded.output.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.output.weight, model.output.weight.bfloat16().float(), rtol=0, atol=0)
    assert load_model(path, dtype=torch.bfloat16)[0].norm.weight.dtype == torch.bfloat16


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"weights .*none.safetensors do not exist"):
        load_model(tmp_path / "none.safetensors")


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(path)


def test_cut_file(model, tmp_path):
    path = tmp_path / "x.safetensors"
    save_model(path, model.state_dict(), model.cfg, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="copy or convert it again"):
        load_model(path)


def test_safetensors_of_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="format 'none', not megastar weights \\("):
        read_model_metadata(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "megastar-tokenizer"})
    with pytest.raises(UserError, match="format 'megastar-tokenizer', not megastar weights \\("):
        load_model(path)


def test_weights_that_do_not_fit_are_named(model, tmp_path):
    path = tmp_path / "x.safetensors"
    state = dict(model.state_dict())
    state["stray"] = state.pop("norm.weight")
    save_model(path, state, model.cfg, {})
    with pytest.raises(UserError, match=r"1 missing \(norm.weight\); 1 unexpected \(stray\)"):
        load_model(path)
    about = {"model": small(dim=24).__dict__, "provenance": {}}
    save_file(dict(model.state_dict()), path, metadata={"format": "megastar-model", "megastar": json.dumps(about)})
    wanted = "have a different architecture: dim 16, not 24; ffn_dim 48, not 64; qkv_dim 48, not 72$"
    with pytest.raises(UserError, match=wanted):
        load_model(path)
    about = {"model": small(n_layer=3, num_classes=9).__dict__, "provenance": {}}
    save_file(dict(model.state_dict()), path, metadata={"format": "megastar-model", "megastar": json.dumps(about)})
    with pytest.raises(UserError, match="have a different architecture: n_layer 2, not 3; num_classes 3, not 9$"):
        load_model(path)
    state = dict(model.state_dict()) | {"norm.weight": torch.ones(17)}
    save_model(path, state, model.cfg, {})
    with pytest.raises(UserError, match=r"1 with a different shape \(norm.weight is \(17,\), not \(16,\)\)"):
        load_model(path)


def test_file_of_a_newer_version(tmp_path):
    path = tmp_path / "x.safetensors"
    about = {"model": small().__dict__ | {"moe": 8}, "provenance": {}}
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "megastar-model", "megastar": json.dumps(about)})
    with pytest.raises(UserError, match="unknown fields moe"):
        load_model(path)
