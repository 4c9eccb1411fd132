"""``megastar train-tokenizer`` trains each quantizer on a few emoji: the loss falls and several codes are used."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from megastar.commands.train_tokenizer import main
from megastar.tokenizer.io import read_tokenizer_metadata
from tests.integration.conftest import ROOT

NETWORK = ["image_size=16", "channels=8", "channel_multipliers=[1,2]", "z_channels=16"]
QUANTIZERS = {
    "vq": ["codebook_size=64"],
    "lfq": ["codebook_size=64", "codebook_embed_dim=6"],
    "fsq": ["codebook_size=60", "codebook_embed_dim=3", "fsq_levels=[5,4,3]"],
    "ibq": ["codebook_size=64"],
}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(ROOT / "assets" / "emoji64" / "emoji64.tar") as tar:
        for split, count in (("train", 24), ("val", 6)):
            members = [m for m in tar.getmembers() if m.name.startswith(f"{split}/")][:count]
            tar.extractall(folder, members, filter="data")
    return folder


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_each_quantizer_trains(emoji, tmp_path, capsys, kind):
    network = [f"tokenizer.{field}" for field in [*NETWORK, f"quantizer={kind}", *QUANTIZERS[kind]]]
    steps = [
        "steps=24",
        "batch=6",
        "warmup=4",
        "lr=5e-3",
        "perceptual=0",
        "eval_every=8",
        "log_every=4",
        "threads=1",
        "entropy_temperature=1",
    ]
    words = [
        str(ROOT / "configs/tokenizer/emoji64.yaml"),
        f"pictures={emoji}",
        "test_subset=",
        f"out={tmp_path}",
        "dtype=fp32",
    ]
    assert main([*words, *network, *steps, f"continuous_steps={5 if kind == 'vq' else 0}"]) == 0
    config, provenance = read_tokenizer_metadata(tmp_path / "tokenizer.safetensors")
    assert config.quantizer == kind
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]  # scores have rows of their own
    first, last = trained[0], trained[-1]
    assert (first["step"], last["step"]) == (4, 24)
    assert last["loss"] < first["loss"] and last["l2"] < first["l2"]
    assert last["batch_codes_used"] * config.codebook_size > 1 and last["batch_perplexity"] > 1
    scores = provenance["scores"]["val"]
    assert scores["codes_used"] * config.codebook_size > 1 and scores["perplexity"] > 1
    assert scores["psnr"] > 5 and f"{scores['psnr']:.2f} dB" in capsys.readouterr().out
