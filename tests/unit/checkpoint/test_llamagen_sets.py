"""Files with several sets of weights, wrapped names, no null class, numbers that are not finite: named or refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megastar import cli
from megastar.checkpoint.convert_weights import open_weights
from megastar.checkpoint.find_weights import find_weights, has_null_class, open_network
from megastar.checkpoint.llamagen_reader import NeedsOption
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import load_model
from megastar.model.transformer import Transformer
from megastar.sampling.pipeline import open_pipeline
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel

CFG = ModelConfig(name="t", n_layer=2, n_head=2, dim=16, multiple_of=8, vocab_size=23, num_classes=4, image_tokens=16)
VQ = TokenizerConfig(16, 32, [1, 1, 2], 1, 8, 23, 4)
TABLE = "cls_embedding.embedding_table.weight"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = Transformer(CFG)
    torch.nn.init.normal_(made.output.weight)
    return dict(made.state_dict())


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_of_several_sets_none_is_taken_silently(state, tmp_path, capsys):
    ema = {k: v + 1 for k, v in state.items()}
    content = {"model": state, "ema": ema, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "steps": 7}
    path = save(content, tmp_path / "w.pt")
    with pytest.raises(
        NeedsOption, match="contains 2 sets of weights, model and ema: give --weights model or --weights"
    ):
        open_weights(path, config=CFG)
    for name, wanted in (("model", state), ("ema", ema)):
        found = open_weights(path, config=CFG, weights=name)
        assert torch.equal(found.read("norm.weight"), wanted["norm.weight"]) and found.provenance["set"] == name
    with pytest.raises(UserError, match="contains no weights named student: it has model and ema"):
        open_weights(path, config=CFG, weights="student")
    words = ["convert", str(path), "--to", "safetensors", "--out", str(tmp_path / "w.safetensors")]
    assert cli.main(words) == 2 and "give --weights model or --weights ema" in capsys.readouterr().err
    assert cli.main(["sample", str(path), "--tokenizer", "t"]) == 2
    assert "contains 2 sets of weights, model and ema" in capsys.readouterr().err


def test_sets_of_a_tokenizers_training_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = VQModel(VQ)
    state = dict(model.state_dict())
    beside = {"discriminator": {"main.0.weight": torch.zeros(2)}, "optimizer": {}, "optimizer_disc": {}}
    alone = save({"model": state, **beside}, tmp_path / "a.pt")
    assert open_weights(alone, image_size=16).cfg == VQ  # the discriminator is no tokenizer
    both = save({"model": state, "ema": {k: 2 * v for k, v in state.items()}, **beside}, tmp_path / "b.pt")
    with pytest.raises(NeedsOption, match="2 sets of weights, model and ema"):
        open_weights(both, image_size=16)
    found = open_weights(both, image_size=16, weights="ema")
    assert torch.equal(found.read("quant_conv.bias"), 2 * state["quant_conv.bias"])
    with pytest.raises(
        UserError,
        match=r"b.pt is not a megastar tokenizer; if it is LlamaGen's: megastar convert .*b.pt --to safetensors --out b.safetensors",
    ):
        open_pipeline(save_own(tmp_path), both, [0])


def save_own(folder: Path) -> Path:
    from tests.checkpoints import save_model

    save_model(folder / "own.safetensors", Transformer(CFG).state_dict(), CFG, {})
    return folder / "own.safetensors"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: f"_fsdp_wrapped_module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_names_of_wrappers_are_removed(state, tmp_path, wrap):
    path = save({wrap(k): v for k, v in state.items()}, tmp_path / "w.pt")
    found = open_weights(path, config=CFG)
    assert found.shapes.keys() == state.keys() and all(torch.equal(found.read(k), v) for k, v in state.items())


def test_names_that_become_equal_and_shards_of_fsdp_are_refused(state, tmp_path):
    twice = save(state | {"module.norm.weight": state["norm.weight"]}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="contains norm.weight twice, with different prefixes"):
        open_weights(twice, config=CFG)
    shard = save(state | {"_fsdp_wrapped_module._flat_param": torch.zeros(3)}, tmp_path / "s.pt")
    with pytest.raises(UserError, match="FSDP's flat parameters: save the model with a full state dict first"):
        open_weights(shard, config=CFG)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(state, tmp_path, value):
    bad = state["norm.weight"].clone()
    bad[3] = value
    path = save({"model": state | {"norm.weight": bad}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"norm.weight is not finite \(NaN or infinite\)"):
        open_weights(path, config=CFG)


def test_a_class_table_without_the_null_class(state, tmp_path):
    args = argparse.Namespace(num_classes=5, image_size=64, downsample_size=16)  # 5 rows: no null class
    path = save({"model": state, "args": args}, tmp_path / "w.pt")
    found = open_weights(path, config=ModelConfig(**vars(CFG) | {"num_classes": 5}))
    assert found.cfg.num_classes == 5 and not has_null_class(found.provenance) and found.provenance["downsample"] == 16
    table = found.read(TABLE)
    assert torch.equal(table[:5], state[TABLE]) and not table[5].any()
    plain = open_weights(save({"model": state}, tmp_path / "p.pt"), config=CFG)
    assert plain.cfg.num_classes == 4 and has_null_class(plain.provenance)
    assert open_weights(tmp_path / "p.pt", config=ModelConfig(**vars(CFG) | {"num_classes": 5})).cfg.num_classes == 5
    with pytest.raises(UserError, match="class table of 5 rows, but --num-classes gives 9 classes: expected 10, or 9"):
        open_weights(tmp_path / "p.pt", config=CFG, num_classes=9)
    wide = state | {TABLE: torch.zeros(1000, 16)}
    with pytest.raises(
        NeedsOption, match="1000 rows: give --num-classes 1000 if it has no null class, or --num-classes 999"
    ):
        open_weights(save({"model": wide}, tmp_path / "w.pt"), image_tokens=16)
    with pytest.raises(
        UserError, match=r"megastar convert .*w.pt --to safetensors --out w.safetensors --num-classes 1000"
    ):
        open_network(tmp_path / "w.pt")


def test_guidance_needs_the_null_class(state, tmp_path, capsys):
    path, own, t = tmp_path / "w.pt", tmp_path / "w.safetensors", tmp_path / "t.safetensors"
    save({"model": state, "args": argparse.Namespace(num_classes=5)}, path)
    torch.manual_seed(0)
    save_tokenizer(VQModel(VQ), t, {})
    (tmp_path / "t.yaml").write_text("\n".join(f"{k}: {v}" for k, v in (vars(CFG) | {"num_classes": 5}).items()))
    words = ["--to", "safetensors", "--out", str(own), "--config", str(tmp_path / "t.yaml"), "--tokenizer", str(t)]
    assert cli.main(["convert", str(path), *words]) == 0
    with pytest.raises(
        UserError, match="have no null class .*so guidance 2 is not possible: sample with guidance scale 1"
    ):
        open_pipeline(own, t, [0], device="cpu", cfg_scale=2.0)
    with pytest.raises(UserError, match="has no null class .*which a probe needs"):
        find_weights(own).require_null_class("a probe needs")
    out = ["--out", str(tmp_path / "g.png"), "--device", "cpu", "--per-class", "1"]
    assert cli.main(["sample", str(own), *out]) == 0  # without guidance; the tokenizer lies beside the weights
    assert cli.main(["sample", str(own), "--cfg-scale", "3", *out]) == 2
    assert "guidance 3 is not possible" in capsys.readouterr().err
    assert torch.equal(load_model(own)[0].state_dict()[TABLE][:5], state[TABLE])


def test_text_to_image_networks_are_named(state, tmp_path):
    t2i = {k: v for k, v in state.items() if k != TABLE} | {
        "cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2),
        "cls_embedding.uncond_embedding": torch.zeros(2, 2),
    }
    with pytest.raises(
        UserError, match=r"text-to-image network of LlamaGen \(t2i: .*class-conditional networks \(c2i\)"
    ):
        open_network(save({"model": t2i}, tmp_path / "t2i_XL_stage1_256.pt"))
