"""From images to images with 2^18 codes: LFQ tokenizer, int32 shards, a factorised head on two tensor ranks, conversion, samples."""

from __future__ import annotations

import json

import numpy as np
import torch

from megastar.config.schema import TokenizerConfig
from megastar.data.shards.manifest import load_manifest
from megastar.model.io import load_model
from megastar.run_dir.layout import METRICS
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.integration.conftest import TOKENIZER, megastar

V = 1 << 18


def test_from_images_to_images(world, tmp_path):
    torch.manual_seed(0)
    fields = vars(TOKENIZER) | {"quantizer": "lfq", "codebook_size": V, "codebook_embed_dim": 18}
    tokenizer, codes = tmp_path / "lfq.safetensors", tmp_path / "codes"
    save_tokenizer(VQModel(TokenizerConfig(**fields)), tokenizer, {})
    words = ["--tokenizer", tokenizer, "--workers", 1, "--device", "cpu"]
    megastar("pretokenize", world.pictures, "--subset", "train", "--out", codes, *words)
    assert load_manifest(codes).dtype == "int32"

    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=4, val_every=0)
    data = [f"data.shards={codes}", "data.val_shards=", f"data.tokenizer={tokenizer}"]
    head = [f"model.vocab_size={V}", "model.head=factorised", "model.head_factors=[512,512]"]
    refused = megastar("train", config, *data, check=False)
    assert refused.returncode == 2 and "the shards have 262144 codes, model.vocab_size is 64" in refused.stderr
    megastar("train", config, *data, *head, "parallel.tensor_parallel=2", "parallel.deepspeed=zero1", ranks=2)
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    losses = [row["loss_ar"] for row in rows if "loss_ar" in row]
    assert abs(losses[0] - np.log(V)) < 0.1 and losses[-1] < losses[0]

    weights = tmp_path / "w.safetensors"
    megastar("convert", run, "--to", "safetensors", "--out", weights)
    model, _ = load_model(weights)
    assert model.cfg.head_factors == [512, 512] and max(p.numel() for p in model.parameters()) < V
    options = ["--tokenizer", tokenizer, "--count", 2, "--device", "cpu", "--npz", tmp_path / "out.npz"]
    megastar("sample", weights, *options, "--cfg-scale", 2, "--top-k", 50)
    with np.load(tmp_path / "out.npz") as made:
        assert made["arr_0"].shape == (2, 16, 16, 3)
