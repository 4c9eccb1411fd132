"""A run as a folder in the Hub's layout, and back: bit-equal weights, the same tokenizer, the same images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import megastar as package
from megastar import cli
from megastar.checkpoint.convert_weights import open_weights
from megastar.checkpoint.hub.convert_to import to_hub_folder
from megastar.checkpoint.hub.reader import damaged_files
from megastar.errors import UserError
from megastar.model.io import read_model_metadata
from megastar.tokenizer.io import tokenizer_hash
from tests.integration.conftest import megastar

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def plain(whole, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "w.safetensors"
    megastar("convert", whole, "--to", "safetensors", "--out", out)
    return out


@pytest.fixture(scope="session")
def sharded(whole, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "parts"
    to_hub_folder(whole, out, "run", shard_bytes=40_000, console=Console(quiet=True))
    return out


def bits(path: Path) -> dict[str, bytes]:
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in load_file(path).items()}


def test_the_round_trip_is_bit_equal_and_keeps_provenance(folder, plain, sharded, tmp_path):
    assert bits(folder / "model.safetensors") == bits(plain)
    parts = sorted(sharded.glob("model-*.safetensors"))
    assert len(parts) > 3 and all(p.stat().st_size < 60_000 for p in parts)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [p.name for p in parts]
    assert {k: v for p in parts for k, v in bits(p).items()} == bits(plain)
    assert damaged_files(sharded) == []
    for source in (folder, sharded):
        out = tmp_path / f"{source.name}.safetensors"
        megastar("convert", source, "--to", "safetensors", "--out", out)
        assert bits(out) == bits(plain)
        assert read_model_metadata(out) == read_model_metadata(plain)
        again = tmp_path / f"{source.name}-again"
        megastar("convert", source, "--to", "hf", "--out", again)
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_every_command_takes_the_folder(folder, plain, sharded, world, tmp_path, capsys):
    images = [package.load(p, device="cpu").sample(1, n=2, seed=3) for p in (folder, sharded)]
    reference = package.load(plain, tokenizer=world.tokenizer, device="cpu").sample(1, n=2, seed=3)
    assert all(np.array_equal(made, reference) for made in images)
    for source in (folder, sharded):
        assert cli.main(["sample", str(source), "--per-class", "1", "--out", str(tmp_path / "grid.png")]) == 0
        assert cli.main(["convert", "--inspect", str(source)]) == 0
    assert '"n_layer": 2' in capsys.readouterr().out
    result = tmp_path / "probe.json"
    words = ["probe", sharded, "--shards", world.codes("train"), "--val-shards", world.codes("val"), "--block", "1"]
    assert cli.main([*map(str, words), "--epochs", "1", "--out", str(result)]) == 0
    assert len(json.loads(result.read_text())["accuracy"]) == 8


@pytest.mark.parametrize("which", ["folder", "sharded"])
def test_a_training_starts_from_the_folder(which, request, plain, world, tmp_path):
    source, losses = request.getfixturevalue(which), []
    for name, init in (("a", source), ("b", plain)):
        config = world.write_config(tmp_path / f"{name}.yaml", tmp_path / name, steps=2, val_every=0, init=str(init))
        megastar("train", config)
        losses.append([json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()])
    assert losses[0] == losses[1]
    config = world.write_config(tmp_path / "c.yaml", tmp_path / "a", steps=3, val_every=0, init=str(source))
    megastar("train", config)  # resumes


def test_the_folder_describes_itself(folder, whole, world):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "megastar" and config["torch_dtype"] == "float32"
    assert (
        config["tokenizer"]["sha256"]
        == tokenizer_hash(world.tokenizer)
        == tokenizer_hash(folder / "tokenizer/tokenizer.safetensors")
    )
    assert json.loads((folder / "tokenizer/config.json").read_text())["tokenizer"]["codebook_size"] == 64
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for text in (
        "| steps | 12 of 12 |",
        "| images seen | 96 |",
        "ST-AR",
        "megastar train ",
        "None are recorded",
        "circle, square, stroke",
    ):
        assert text in card, text


def test_the_card_has_the_scores_of_these_weights_with_their_protocol(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step, value in ((12, 123.4), (8, 567.8)):
        result = {
            "scores": {"fd_efflite0": value}, "generated": {"pictures": 30}, "real": {"pictures": 27, "source": "a|b\n# x"},
            "features": {"name": "efflite0"}, "provenance": {"trained": {"step": step, "weights": "ema"}, "cfg_scale": 1.5, "seed": 7},
        }  # fmt: skip
        (run / f"scores-{step}.json").write_text(json.dumps(result))
    megastar("convert", run, "--to", "hf", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| fd\\_efflite0 | 123.4 | 30 | 27 of a\\|b\\\\n\\# x | features efflite0, cfg\\_scale 1.5, seed 7 |"
        in card.replace("; cfg", ", cfg")
    )
    assert "567.8" not in card and "Not stated" in card and "license" not in card.split("---")[1]


def test_the_card_has_the_scores_of_the_same_weights_only(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    plain = {"cfg_schedule": "constant", "cfg_interval": -1}
    other = {
        "cfg_schedule": "linear",
        "cfg_interval": 4,
        "parallel_steps": 8,
        "schedule": "uniform",
        "token_order": "random",
    }
    for weights, value, sampler in (("ema", 11.5, plain), ("student", 22.5, other), (None, 33.5, plain)):
        trained = {"step": 12} | ({"weights": weights} if weights else {})
        result = {"scores": {"FID": value}, "provenance": {"trained": trained, "cfg_scale": 1.5, **sampler}}
        (run / f"scores-{weights}.json").write_text(json.dumps(result))

    def card(*words: object) -> str:
        megastar("convert", run, "--to", "hf", "--out", tmp_path / "out", "--force", *words)
        return (tmp_path / "out/README.md").read_text().replace("\\", "")

    ema, student = card(), card("--weights", "student")
    assert "| FID | 11.5 |  |  of ? | cfg_scale 1.5 |" in ema and "22.5" not in ema and "33.5" not in ema
    protocol = ", ".join(f"{k} {v}" for k, v in {"cfg_scale": 1.5, **other, "weights": "student"}.items())
    assert f"| FID | 22.5 |  |  of ? | {protocol} |" in student and "11.5" not in student
    named = card("--weights", "student", "--scores", run / "scores-ema.json")
    assert "cfg_scale 1.5, weights ema |" in named  # named by the user, so the card tells whose they are


def test_files_of_scores_with_equal_names_are_all_in_the_card(folder, tmp_path):
    words = []
    for name, value in (("a", 11.5), ("b", 22.5)):
        (tmp_path / name).mkdir()
        result = {"scores": {"FID": value}, "provenance": {"trained": {"step": 12, "weights": "ema"}}}
        (tmp_path / name / "scores.json").write_text(json.dumps(result))
        words += ["--scores", tmp_path / name / "scores.json"]
    again = ["--scores", tmp_path / "b/../a/scores.json"]  # the same file has one row
    megastar("convert", folder, "--to", "hf", "--out", tmp_path / "out", *words, *again)
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("| FID | 11.5 |") == 1 and card.count("| FID | 22.5 |") == 1


def refusal(*words: object, capsys) -> str:
    capsys.readouterr()
    assert cli.main([str(w) for w in words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_folders_that_are_refused(folder, sharded, tmp_path, capsys):
    def made(name: str, source: Path | None = None, **files: object) -> Path:
        out = tmp_path / name
        if source:
            shutil.copytree(source, out)
        out.mkdir(exist_ok=True)
        for file, content in files.items():
            (out / file.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
        return out

    def said(path: Path) -> str:
        return refusal("sample", path, "--out", tmp_path / "grid.png", capsys=capsys)

    llama = made("llama", config__json={"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert "holds a model of transformers (llama, LlamaForCausalLM), not one of megastar" in said(llama)
    unet = made("unet", config__json={"_class_name": "UNet2DModel", "_diffusers_version": "0.30"})
    assert "a model of diffusers (UNet2DModel)" in said(unet)
    assert "a pipeline of diffusers" in said(made("pipe", model_index__json={"_class_name": "DiTPipeline"}))
    assert "has no config.json, but pytorch_model.bin" in said(made("bin", **{"pytorch_model__bin": "x"}))
    config = json.loads((folder / "config.json").read_text())
    newer = made("newer", folder, config__json=config | {"megastar_format": 2})
    assert "written by a newer megastar" in said(newer)
    other = made("other", folder, config__json=config | {"model": config["model"] | {"n_head": 1}})
    assert "describe different networks" in said(other)
    pickled = made(
        "pickled", folder, config__json=config | {"weights": {"model.bin": {"bytes": 1, "sha256": "0" * 64}}}
    )
    assert "only .safetensors files are read" in said(pickled)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    for name in ("../../x.safetensors", "/etc/passwd", "..", "a/b.safetensors"):
        bad = {"weight_map": index["weight_map"] | {first: name}}
        out = made("bad-index", sharded, **{"model__safetensors__index__json": bad})
        assert "model.safetensors.index.json is damaged" in said(out), name
        shutil.rmtree(out)
        parts = json.loads((sharded / "config.json").read_text())
        parts["weights"][name] = parts["weights"].popitem()[1]
        out = made("bad-names", sharded, config__json=parts)
        assert "config.json is damaged" in said(out), name
        shutil.rmtree(out)
    lost = made("lost", sharded)
    next(lost.glob("model-00002*")).unlink()
    assert "does not exist, although model.safetensors.index.json names it" in said(lost)
    swapped = made("swapped", sharded)
    a, b = sorted(swapped.glob("model-*"))[:2]
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    assert "does not hold the weights that" in said(swapped)
    assert not (tmp_path / "grid.png").exists()


def test_conversions_that_are_refused(folder, whole, world, tmp_path, capsys):
    torch.manual_seed(9)
    from megastar.tokenizer.io import save_tokenizer
    from megastar.tokenizer.vq import VQModel
    from tests.integration.conftest import TOKENIZER

    another = tmp_path / "another.safetensors"
    save_tokenizer(VQModel(TOKENIZER), another, {})
    out = tmp_path / "out"
    words = ("convert", whole, "--to", "hf", "--out", out)
    assert "name the tokenizer of the training with --tokenizer" in refusal(
        *words, "--tokenizer", another, capsys=capsys
    )
    assert "identifier of the Hub" in refusal(*words, "--license", "my licence", capsys=capsys)
    assert "--license applies to --to hf: leave it out with --to safetensors" in refusal(
        "convert", whole, "--to", "safetensors", "--out", tmp_path / "w.safetensors", "--license", "mit", capsys=capsys
    )
    assert "has weights only" in refusal("convert", folder, "--to", "universal", "--out", out, capsys=capsys)
    assert "contains the ema weights only" in refusal("sample", folder, "--weights", "student", capsys=capsys)
    (tmp_path / "bad.json").write_text("{}")
    assert "scores is missing" in refusal(*words, "--scores", tmp_path / "bad.json", capsys=capsys)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert "pass --force" in refusal(*words, capsys=capsys)
    assert "also contains mine.txt" in refusal(*words, "--force", capsys=capsys)
    with pytest.raises(UserError, match="one set of weights"):
        open_weights(folder, weights="model")
