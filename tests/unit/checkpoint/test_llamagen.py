"""LlamaGen's files: every layout is read, nothing else is, and what was read goes back as it came."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from megastar import cli
from megastar.checkpoint.llamagen_reader import model_config
from megastar.checkpoint.llamagen_sets import WeightSet, tokens_in
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import load_model, read_model_metadata, shape_fields
from megastar.model.rope import rope_table
from megastar.model.transformer import Transformer
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from megastar.utils.files import sha256

CFG = ModelConfig(name="t", n_layer=2, n_head=2, dim=16, multiple_of=8, vocab_size=23, num_classes=4, image_tokens=16)
VQ = TokenizerConfig(16, 32, [1, 1, 2], 1, 8, 23, 4)


@pytest.fixture(scope="module")
def network() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CFG).eval()
    torch.nn.init.normal_(made.output.weight)
    return made


@pytest.fixture
def yaml_file(tmp_path) -> Path:
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(vars(CFG)))
    return path


def convert(*words) -> int:
    return cli.main(["convert", *map(str, words)])


def refused(capsys, *words) -> str:
    assert convert(*words) == 2
    out = capsys.readouterr()
    assert out.err.startswith("megastar: error: ") and out.err.count("\n") == 1, out.err
    return out.err


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def freqs(cfg: ModelConfig) -> torch.Tensor:
    return rope_table(cfg.grid, cfg.head_dim, cfg.rope_base, torch.device("cpu"))


# Networks ----------------------------------------------------------------------------------------------------
LAYOUTS = {
    "flat": lambda w: w,
    "model": lambda w: {"model": w},
    "module": lambda w: {"module": w},
    "state_dict": lambda w: {"state_dict": w},
    "freqs_cis": lambda w: {"model": w | {"freqs_cis": freqs(CFG)}},
    "trainer": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}, "optimizer": {"state": {0: {"step": 1.0}}},
                          "steps": 70000, "args": argparse.Namespace(gpt_model="GPT-B", lr=1e-4)},
    "compiled": lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout_of_a_checkpoint_is_read(network, tmp_path, yaml_file, layout, legacy):
    path, out = tmp_path / "w.pt", tmp_path / "w.safetensors"
    torch.save(LAYOUTS[layout](dict(network.state_dict())), path, _use_new_zipfile_serialization=not legacy)
    assert convert(path, "--to", "safetensors", "--out", out, "--config", yaml_file) == 0
    loaded, about = load_model(out)
    assert same(loaded.state_dict(), network.state_dict()) and loaded.cfg == CFG
    step = 70000 if layout == "trainer" else None
    assert about == {"weights": "llamagen", "source": "w.pt", "source_sha256": sha256(path), "step": step}
    labels, tokens = torch.tensor([0, 4]), torch.randint(23, (2, 15))
    assert torch.equal(loaded(labels, tokens).logits, network(labels, tokens).logits)


def test_a_network_goes_back_as_it_came(network, tmp_path, yaml_file, capsys):
    path, own, back = tmp_path / "w.pt", tmp_path / "w.safetensors", tmp_path / "back.pt"
    torch.save({"model": network.state_dict(), "steps": 5}, path)
    save_tokenizer(VQModel(VQ), tmp_path / "t.safetensors", {})
    words = [path, "--to", "safetensors", "--out", own, "--config", yaml_file]
    assert convert(*words, "--tokenizer", tmp_path / "t.safetensors") == 0
    beside = json.loads((tmp_path / "w.json").read_text())
    assert beside["sha256"] == sha256(own) and beside["step"] == 5 and beside["model"] == vars(CFG)
    assert beside["tokenizer"] == tokenizer_hash(tmp_path / "t.safetensors")
    assert convert(own, "--to", "llamagen", "--out", back) == 0
    assert "Transformer(ModelArgs(n_layer=2, n_head=2, dim=16" in capsys.readouterr().out
    assert same(torch.load(back, weights_only=True)["model"], dict(network.state_dict()))
    assert convert(back, "--to", "safetensors", "--out", tmp_path / "2.safetensors", "--config", yaml_file) == 0
    assert read_model_metadata(tmp_path / "2.safetensors")[1]["step"] == 5
    assert convert(own, "--inspect", "--verify") == 0
    assert '"parameters"' in capsys.readouterr().out
    data = bytearray(own.read_bytes())
    data[-1] ^= 1
    own.write_bytes(data)
    assert convert(own, "--inspect", "--verify") == 1
    (tmp_path / "w.json").unlink()
    assert "w.json does not exist" in refused(capsys, own, "--inspect", "--verify")


def meta(**sizes) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(Transformer(ModelConfig(**sizes)).state_dict())


@pytest.mark.parametrize(
    ("n_layer", "n_head", "dim", "name"),
    [(12, 12, 768, "gpt-b"), (24, 16, 1024, "gpt-l"), (36, 20, 1280, "gpt-xl"), (48, 24, 1536, "gpt-xxl"), (24, 32, 3200, "gpt-3b")],
)  # fmt: skip
def test_released_sizes_are_known_by_their_shapes(n_layer, n_head, dim, name):
    sizes = {"n_layer": n_layer, "n_head": n_head, "dim": dim, "image_tokens": 576}
    found = model_config(Path("w.pt"), meta(**sizes), image_tokens=576)
    assert found == ModelConfig(name=name, **sizes)


def test_tokens_are_known_by_the_table_or_the_released_name():
    empty = WeightSet("model", {})
    assert tokens_in(Path("w.pt"), {}, WeightSet("model", {"module.freqs_cis": torch.zeros(577, 32, 2)})) == 576
    assert tokens_in(Path("c2i_B_256.pt"), {}, empty) == 256 and tokens_in(Path("c2i_3B_384.pt"), {}, empty) == 576
    assert tokens_in(Path("w.pt"), {}, empty) is None
    args = argparse.Namespace(image_size=384, downsample_size=16)
    assert tokens_in(Path("w.pt"), {"args": types.SimpleNamespace(**vars(args))}, empty) == 576
    odd = meta(n_layer=12, multiple_of=100)
    assert model_config(Path("w.pt"), odd, image_tokens=256).ffn_dim == 2100
    assert shape_fields({}) == {}


def test_another_architecture_lists_the_differing_fields(network, tmp_path, yaml_file, capsys):
    path = tmp_path / "w.pt"
    torch.save({"model": network.state_dict() | {"freqs_cis": freqs(CFG)}}, path)
    words = [path, "--to", "safetensors", "--out", tmp_path / "w.safetensors"]
    other = vars(CFG) | {"n_layer": 3, "dim": 32, "vocab_size": 64, "image_tokens": 64}
    yaml_file.write_text(yaml.safe_dump(other))
    told = refused(capsys, *words, "--config", yaml_file)
    assert "has a different architecture: n_layer 2, not 3; vocab_size 23, not 64; dim 16, not 32; ffn_dim" in told
    assert "image_tokens 16, not 64" in told
    told = refused(capsys, *words)
    assert (
        "has 2 blocks of width 16, which is not one of LlamaGen's sizes (GPT-B 12 x 768, " in told
        and "--config" in told
    )
    assert "was trained on 16 tokens per image, not --image-tokens 25" in refused(capsys, *words, "--image-tokens", 25)
    torch.save({"model": network.state_dict()}, path)
    assert "does not store the number of tokens per image: give --image-tokens, 256" in refused(capsys, *words)
    assert "--image-tokens 24 is not a square number" in refused(capsys, *words, "--image-tokens", 24)
    state = dict(network.state_dict())
    state["layers.0.attention.wqkv.weight"] = torch.zeros(32, 16)
    torch.save(state, path)
    assert "has fewer key/value heads than query heads" in refused(capsys, *words, "--image-tokens", 16)
    torch.save(dict(network.state_dict()) | {"cls_embedding.cap_proj.fc1.weight": torch.zeros(1)}, path)
    assert "is a text-to-image network of LlamaGen (t2i: " in refused(capsys, *words)
    assert not (tmp_path / "w.safetensors").exists() and not (tmp_path / "w.json").exists()


# Files that are no weights -----------------------------------------------------------------------------------
class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", ["zip", "old", "bare"])
def test_a_hostile_pickle_is_refused_without_running_it(network, tmp_path, capsys, legacy):
    path, trap = tmp_path / "w.pt", tmp_path / "trap"
    content = {"model": dict(network.state_dict()), "extra": Hostile(str(trap))}
    if legacy == "bare":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=legacy == "zip")
    told = refused(capsys, path, "--to", "safetensors", "--out", tmp_path / "w.safetensors")
    assert "can run code when loaded: ask its author" in told and not trap.exists()
    assert legacy == "bare" or "an object of posix.mkdir" in told
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(network, tmp_path, capsys, keep, legacy):
    path = tmp_path / "w.pt"
    torch.save({"model": network.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    told = refused(capsys, path, "--to", "safetensors", "--out", tmp_path / "w.safetensors", "--image-tokens", 16)
    assert "w.pt is truncated or not a torch.save file" in told or "can run code when loaded: ask its author" in told


def test_other_contents_are_told(tmp_path, capsys):
    path = tmp_path / "w.pt"
    words = [path, "--to", "safetensors", "--out", tmp_path / "w.safetensors"]
    for content, sentence in [
        ([1, 2], "contains a list, not a dictionary of weights: use a file with named tensors"),
        ({"epoch": 3}, "contains epoch: expected weights at the top level or in a dictionary such as model, ema,"),
        ({"a.weight": torch.zeros(1)}, "is not an AR network of LlamaGen: its first names are a.weight"),
        ({"quantize.embedding.weight": torch.zeros(2, 2)}, "is not a VQ tokenizer of LlamaGen"),
    ]:
        torch.save(content, path)
        assert sentence in refused(capsys, *words)
    assert "nowhere.pt do not exist" in refused(capsys, tmp_path / "nowhere.pt", *words[1:])
    torch.save({}, path)
    for more, sentence in [
        (["--weights", "ema"], "contains nothing: expected weights at the top level"),
        (["--image-size", "0"], "'0' is not an integer from 1 to 4096"),
    ]:
        assert sentence in refused(capsys, *words, *more)
    assert "needs a run's checkpoint" in refused(capsys, path, "--to", "universal", "--out", tmp_path / "u")
    told = refused(capsys, tmp_path, "--to", "safetensors", "--out", tmp_path / "u", "--config", path)
    assert "--config applies only to a .pt file of LlamaGen" in told


# Tokenizers --------------------------------------------------------------------------------------------------
def test_a_tokenizer_is_read_and_goes_back(tmp_path, capsys):
    torch.manual_seed(1)
    model = VQModel(VQ).eval()
    path, own, back = tmp_path / "vq.pt", tmp_path / "vq.safetensors", tmp_path / "back.pt"
    torch.save({"model": dict(model.state_dict()) | {"quantize.codebook_used": torch.ones(65536)}}, path)
    words = ["--to", "safetensors", "--out", own]
    assert "--image-size 18 is not a multiple of 4" in refused(capsys, path, *words, "--image-size", 18)
    assert convert(path, *words, "--image-size", 16) == 0
    assert read_tokenizer_metadata(own)[0] == VQ and json.loads((tmp_path / "vq.json").read_text())["sha256"] == sha256(
        own
    )
    again = load_tokenizer(own)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = again.encode(images)
    assert torch.equal(codes, model.encode(images)) and torch.equal(
        again.decode_codes(codes), model.decode_codes(codes)
    )
    assert convert(own, "--to", "llamagen", "--out", back) == 0
    there = torch.load(back, weights_only=True)["model"]
    assert there.pop("quantize.codebook_used").shape == (65536,) and same(there, dict(model.state_dict()))
    assert convert(back, "--to", "safetensors", "--out", tmp_path / "2.safetensors", "--image-size", 16) == 0
    assert same(load_file(tmp_path / "2.safetensors"), load_file(own))
    state = dict(model.state_dict())
    state["stray"] = state.pop("quant_conv.bias")
    torch.save(state, path)
    told = refused(capsys, path, *words, "--image-size", 16, "--force")
    assert "does not fit its architecture: quant_conv.bias is missing, stray is unexpected" in told


def test_released_tokenizers_are_known_by_their_shapes():
    from megastar.checkpoint.llamagen_reader import tokenizer_config

    for multipliers in ([1, 1, 2, 2, 4], [1, 2, 2, 4]):
        wanted = TokenizerConfig(channel_multipliers=multipliers)
        with torch.device("meta"):
            weights = dict(VQModel(wanted).state_dict())
        assert tokenizer_config(Path("vq.pt"), weights, 256) == wanted
    with pytest.raises(UserError, match="is not a VQ tokenizer of LlamaGen"):
        tokenizer_config(Path("vq.pt"), {"encoder.conv_in.weight": torch.zeros(3)}, 256)


def test_sampling_with_a_tokenizer_of_other_shapes_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    model = VQModel(VQ)
    model.config = TokenizerConfig(**vars(VQ) | {"z_channels": 16})
    save_tokenizer(model, path, {})
    with pytest.raises(UserError, match=r"does not fit its architecture: encoder.conv_out.weight is .* and \d more"):
        load_tokenizer(path)
    assert np.isfinite(model.config.grid)
