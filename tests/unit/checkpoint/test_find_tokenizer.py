"""The tokenizer of weights: recorded, searched, compared; another one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import megastar
from megastar import cli
from megastar.checkpoint.convert_weights import convert_file, open_weights
from megastar.checkpoint.find_tokenizer import check_identity, identity_of, recorded_identity
from megastar.checkpoint.find_weights import SHIPPED_TOKENIZER, SHIPPED_WEIGHTS, Weights, find_weights
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import metadata_of, read_model_metadata
from megastar.model.transformer import Transformer
from megastar.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from tests.checkpoints import save_model

ROOT = Path(__file__).parents[3]
CFG = ModelConfig(name="t", n_layer=1, n_head=2, dim=16, multiple_of=8, vocab_size=23, num_classes=4, image_tokens=16)
VQ = TokenizerConfig(16, 32, [1, 1, 2], 1, 8, 23, 4)


def tokenizer(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_tokenizer(VQModel(VQ), path, {})
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, Path]:
    """Weights that record the first of two tokenizers; both lie elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    first, second = (tokenizer(tmp_path / "elsewhere" / f"{n}.safetensors", n) for n in (1, 2))
    weights = tmp_path / "w.safetensors"
    save_model(weights, Transformer(CFG).state_dict(), CFG, {"tokenizer": tokenizer_hash(first)})
    return weights, first, second


def test_another_tokenizer_is_refused_everywhere(files, tmp_path, capsys):
    weights, first, second = files
    mine, other = tokenizer_hash(first)[:12], tokenizer_hash(second)[:12]
    sentence = f"was trained on codes of the tokenizer {mine}, but {second} has the hash {other}: name the tokenizer"
    with pytest.raises(UserError, match=sentence):
        megastar.load(weights, tokenizer=second, device="cpu")
    words = ["sample", str(weights), "--tokenizer", str(second), "--out", str(tmp_path / "g.png"), "--device", "cpu"]
    assert cli.main(words) == 2 and sentence in capsys.readouterr().err and not (tmp_path / "g.png").exists()
    assert cli.main([*words, "--any-tokenizer", "--per-class", "1"]) == 0 and (tmp_path / "g.png").exists()
    assert "decoded with it nevertheless" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:  # rank 0 reports it
        patch.setenv("RANK", "1")
        patch.setenv("WORLD_SIZE", "2")
        npz = str(tmp_path / "x.npz")
        assert cli.main([*words[:4], "--any-tokenizer", "--npz", npz, "--per-class", "1", "--device", "cpu"]) == 0
        assert "nevertheless" not in "".join(capsys.readouterr())
    assert megastar.load(weights, tokenizer=second, device="cpu", any_tokenizer=True).num_classes == 4
    with pytest.raises(UserError, match=f"of the tokenizer {mine}, but --tokenizer .* has the hash {other}"):
        convert_file(open_weights(weights), "safetensors", tmp_path / "c.safetensors", tokenizer=second)


def test_the_recorded_tokenizer_is_searched(files, tmp_path):
    weights, first, second = files
    found = find_weights(weights)
    with pytest.raises(
        UserError, match=r"which is in none of the places .*emoji64-vq.safetensors has [0-9a-f]{12}.*--tokenizer"
    ):
        found.tokenizer_file()
    shutil.copy(second, tmp_path / "a.safetensors")
    shutil.copy(first, tmp_path / "b.safetensors")
    assert Path(found.tokenizer_file()) == tmp_path / "b.safetensors"
    shards = tmp_path / "codes" / "train"
    shards.mkdir(parents=True)
    shutil.move(tmp_path / "b.safetensors", tmp_path / "codes" / "vq.safetensors")
    assert Path(Weights(weights, shards=str(shards)).tokenizer_file()) == tmp_path / "codes" / "vq.safetensors"
    named = Weights(weights, places=[second, first])
    assert Path(named.tokenizer_file()) == first


def test_the_shipped_tokenizer_goes_with_the_shipped_weights_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shipped = find_weights(None)
    assert shipped.identity == tokenizer_hash(ROOT / SHIPPED_TOKENIZER)
    assert Path(shipped.tokenizer_file()).samefile(ROOT / SHIPPED_TOKENIZER)
    shutil.copy(ROOT / SHIPPED_WEIGHTS, "copy.safetensors")
    assert find_weights("copy.safetensors").identity == shipped.identity
    other = tokenizer(tmp_path / "t.safetensors", 1)
    with pytest.raises(UserError, match="was trained on codes of the tokenizer"):
        megastar.load(tokenizer=other, device="cpu")
    save_model(tmp_path / "old.safetensors", Transformer(CFG).state_dict(), CFG, {})
    with pytest.raises(UserError, match="old.safetensors records no tokenizer, so the one .* give it with --tokenizer"):
        megastar.load("old.safetensors", device="cpu")
    assert megastar.load("old.safetensors", tokenizer=other, device="cpu").num_classes == 4
    assert "old.safetensors records no tokenizer hash: that" in caplog.text and "cannot be checked" in caplog.text


def test_the_identity_is_that_of_the_codes(tmp_path):
    first = tokenizer(tmp_path / "1.safetensors", 1)
    model = load_tokenizer(first)
    for p in model.decoder.parameters():
        p.data += 1
    save_tokenizer(model, tmp_path / "2.safetensors", {})
    assert identity_of(first) == identity_of(tmp_path / "2.safetensors")
    check_identity("w", identity_of(first), tmp_path / "2.safetensors")
    model.quantize.embedding.weight.data[0] += 1
    save_tokenizer(model, first, {})  # the file was replaced
    assert identity_of(first) != identity_of(tmp_path / "2.safetensors")
    for value in (None, 5, "x" * 64, "a" * 63, ["a" * 64]):
        assert recorded_identity({"tokenizer": value}) == ""


def test_the_identity_survives_both_conversions(files, tmp_path):
    weights, first, _ = files
    (tmp_path / "t.yaml").write_text("\n".join(f"{k}: {v}" for k, v in vars(CFG).items()))
    convert_file(open_weights(weights), "llamagen", tmp_path / "w.pt")
    back = open_weights(tmp_path / "w.pt", config=tmp_path / "t.yaml")
    convert_file(back, "safetensors", tmp_path / "back.safetensors")
    assert read_model_metadata(tmp_path / "back.safetensors")[1]["tokenizer"] == tokenizer_hash(first)
    assert json.loads(metadata_of(CFG, {"tokenizer": "x"})["megastar"])["provenance"] == {"tokenizer": "x"}


def test_a_tokenizer_with_another_number_of_codes_is_not_recorded(files, tmp_path):
    torch.manual_seed(0)
    save_tokenizer(VQModel(TokenizerConfig(16, 32, [1, 1, 2], 1, 8, 24, 4)), tmp_path / "t.safetensors", {})
    save_model(tmp_path / "o.safetensors", Transformer(CFG).state_dict(), CFG, {})
    with pytest.raises(UserError, match="has 23 codes, but --tokenizer .* has 24"):
        convert_file(
            open_weights(tmp_path / "o.safetensors"),
            "safetensors",
            tmp_path / "c.safetensors",
            tokenizer=tmp_path / "t.safetensors",
        )
