"""The memory of evaluations from shapes: against the tokenizer's and the cache's own sizes, and as `megastar plan` shows it.

The peak is compared with torch's CUDA allocator in tests/nullgpu/test_memory.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from megastar import cli
from megastar.config.load import load_config
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.parallel.evaluation_memory import cache_bytes, evaluation_bytes, tokenizer_elements
from megastar.sampling.kv_cache import KVCache
from megastar.tokenizer.vq import VQModel

XL = "configs/run/star_xl_50ep.yaml"
WORDS = ["data.shards=none", "data.val_shards=", "data.tokenizer=none.safetensors", "eval.every=1000"]


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(),
        TokenizerConfig(channels=32, channel_multipliers=[1, 2, 4, 4], norm_groups=8, image_size=64, res_blocks=1),
        TokenizerConfig(channels=32, channel_multipliers=[2], image_size=64),
        TokenizerConfig(channels=64, channel_multipliers=[3, 1, 2]),
        TokenizerConfig(quantizer="lfq", codebook_embed_dim=14),
    ],
)
def test_the_tokenizers_weights(config: TokenizerConfig) -> None:
    with torch.device("meta"):
        model = VQModel(config)
    assert tokenizer_elements(config) == sum(p.numel() for p in model.parameters())


def test_the_cache() -> None:
    model = ModelConfig(n_layer=3, n_head=4, dim=128, image_tokens=64)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert KVCache.for_model(model, 6, dtype, "cpu").nbytes == cache_bytes(model, 6, name)


def test_what_the_memory_depends_on() -> None:
    cfg = load_config(XL, WORDS)
    plain = evaluation_bytes(cfg, TokenizerConfig(), "bf16")
    assert plain["decoding"] == 64 * 4 * 5 * 128 * 256**2 and plain["cache"] == cache_bytes(cfg.model, 64, "bf16")
    cfg.eval.cfg_scale = 1.5
    assert evaluation_bytes(cfg, TokenizerConfig(), "bf16")["cache"] == 2 * plain["cache"]
    cfg.eval.samples = 16  # fewer than eval.batch
    assert evaluation_bytes(cfg, TokenizerConfig(), "bf16")["decoding"] == plain["decoding"] // 4
    cfg.eval.every = 0
    assert evaluation_bytes(cfg, TokenizerConfig(), "bf16") == {}


def test_the_plan_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", XL, "--gpus", "8", *WORDS]) == 0
    out, err = capsys.readouterr()
    assert "none.safetensors is not here: the memory of evaluations is that of LlamaGen's VQ-16 at 256 pixels" in err
    assert "an evaluation of 64 images at once: " in out and "decoding 10.0" in out
    assert cli.main(["plan", XL, "--gpus", "8", *WORDS, "eval.batch=256", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert all(p["need"] > max(p["evaluating"], p["total"]) for p in plans)
    assert any(p["evaluating"] > p["total"] for p in plans)
    assert cli.main(["plan", XL, "--gpus", "8", *WORDS, "eval.batch=1024"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "for the evaluations (decoding 160.0 GiB, cache 45.0 GiB); set eval.batch below 1024" in text
    assert cli.main(["plan", XL, "--gpus", "8", *WORDS, "eval.every=0"]) == 0
    out, err = capsys.readouterr()
    assert "evaluation of" not in out and "VQ-16" not in err
