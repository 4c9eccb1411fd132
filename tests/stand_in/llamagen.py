"""A checkout that has LlamaGen's modules and interfaces, written into a folder: the benchmarks run against it in the tests.

The networks are megastar's own. Generation is independent of megastar's sampler: without a cache, the whole sequence for
each token, as in autoregressive/models/generate.py.
"""

from __future__ import annotations

from pathlib import Path

# WORK: what the step does with its batch, besides.
GPT = """
import dataclasses

import torch.nn.functional as F

from megastar.config.schema import ModelConfig
from megastar.model import transformer


def ModelArgs(block_size, **fields):
    return ModelConfig(image_tokens=block_size, **fields)


class Transformer(transformer.Transformer):
    freqs_cis = range(100_000)  # cut by whoever wants whole sequences
    model_type = "c2i"

    def forward(self, idx, cond_idx, targets=None):
        WORK
        logits = super().forward(cond_idx, idx).logits
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
"""
GENERATE = """
import torch


@torch.no_grad()
def generate(model, cond, count, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True):
    assert top_k == 0 and top_p == 1
    null, tokens = torch.full_like(cond, model.cfg.num_classes), cond.new_zeros(len(cond), 0)
    for i in range(count):
        logits = model(tokens, cond)[0][:, -1]
        if cfg_scale > 1 and not -1 < cfg_interval < i - 1:
            without = model(tokens, null)[0][:, -1]
            logits = without + (logits - without) * cfg_scale
        shares = torch.softmax(logits / temperature, -1)
        drawn = torch.multinomial(shares, 1) if sample_logits else shares.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens
"""
TOKENIZER = """
import torch

from megastar.config.schema import TokenizerConfig
from megastar.tokenizer.vq import VQModel


class Model(VQModel):
    def __init__(self, config):
        super().__init__(config)
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))

    def encode(self, images):
        codes = super().encode(images)
        return None, None, (None, None, codes.flatten())

    def decode_code(self, codes, shape):
        return self.decode_codes(codes.view(shape[0], -1))


def make(levels):
    def model(codebook_size=512, codebook_embed_dim=8):
        sizes = dict(codebook_size=codebook_size, codebook_embed_dim=codebook_embed_dim, norm_groups=32)
        return Model(TokenizerConfig(channels=32, channel_multipliers=levels, image_size=SIZE, **sizes))
    return model


VQ_models = {"VQ-16": make([1, 1, 2, 2, 4]), "VQ-8": make([1, 2, 2, 4])}
"""


def write_checkout(folder: Path, *, work: str = "pass", image: int = 32) -> Path:
    """``folder`` as a checkout of LlamaGen; ``image``: side of the tokenizers' images in pixels."""
    files = {
        "autoregressive/models/gpt.py": GPT.replace("WORK", work),
        "autoregressive/models/generate.py": GENERATE,
        "tokenizer/tokenizer_image/vq_model.py": TOKENIZER.replace("SIZE", str(image)),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
