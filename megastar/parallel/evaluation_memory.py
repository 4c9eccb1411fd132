"""Memory of the evaluations while a run trains (``eval.every``), which sample from the whole network on each rank.

Computed from shapes as in budget.py; without torch. B images are sampled at once. Not counted: what cuDNN and cuBLAS
allocate for themselves, and CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megastar.config.schema import ModelConfig, RunConfig, TokenizerConfig
from megastar.config.sections.evaluation import EvaluationConfig
from megastar.parallel.budget import ELEMENT, parameter_shapes
from megastar.parallel.head import logits_per_token

# Weights in fp32, and the peak of a forward pass per image: bytes, of torch's CUDA allocator (tests/nullgpu/test_memory.py).
FEATURES = {
    "fd": (18_600_000, 4_250_000),  # EfficientNet-Lite0 at 128 pixels
    "fid": (97_200_000, 14_910_000),  # Inception at 299 pixels
    "fd_dinov2": (1_217_000_000, 15_000_000),  # ViT-L/14 at 224 pixels
}
SAMPLED = ["network", "cache", "sampling", "tokenizer", "decoding", "features"]


def evaluation_bytes(cfg: RunConfig, tokenizer: TokenizerConfig, dtype: str) -> dict[str, int]:
    """Bytes on a rank's device at the peak of an evaluation, beside the states of training; empty without ``eval.every``.

    By cause: network (its weights), cache (keys and values), sampling (logits), tokenizer (its weights), decoding
    (activations of the tokenizer's decoder), features (weights and activations of the network that scores).
    """
    e, m = cfg.eval, cfg.model
    if not e.every:
        return {}
    B, size = min(e.batch, e.samples), ELEMENT[dtype]
    counts = [math.prod(shape) for name, shape in parameter_shapes(m).items()]
    weights, per_image = FEATURES[e.metric]
    held = {
        "network": size * sum(counts),
        "cache": cache_bytes(m, B * (1 + (e.cfg_scale != 1)), dtype),
        "tokenizer": 4 * tokenizer_elements(tokenizer),
        "features": weights,
    }
    pixels = 3 * tokenizer.image_size**2
    phases = [
        {
            "network": held["network"] + 3 * 4 * max(counts),
            "features": 0,
            "tokenizer": 0,
            "cache": 0,
        },  # weights are read
        {"sampling": B * logit_bytes(m, e, dtype)},
        {"decoding": B * 4 * decoder_peak(tokenizer)},
        {"features": weights + B * (per_image + pixels)},
    ]
    peak = max((held | phase for phase in phases), key=lambda phase: sum(phase.values()))
    return {name: peak.get(name, 0) for name in SAMPLED}


def held_bytes(memory: Mapping[str, int], stage: int, data: int) -> int:
    """Of ``budget.memory_bytes``, what exists between steps: the states, and with several data ranks at stages 2 and 3 the
    gradients' partition, at stage 3 the buckets."""
    held = ["weights", "optimizer", "ema", "teacher"]
    held += (["gradients"] if stage >= 2 and data > 1 else []) + (["buckets"] if stage == 3 else [])
    return sum(memory[name] for name in held)


def cache_bytes(m: ModelConfig, rows: int, dtype: str) -> int:
    """Keys and values of ``rows`` sequences of the full length (sampling/kv_cache.py)."""
    return 2 * m.n_layer * rows * m.image_tokens * m.dim * ELEMENT[dtype]


def logit_bytes(m: ModelConfig, e: EvaluationConfig, dtype: str) -> int:
    """Of an image: the logits, with guidance of two rows, in the compute type and fp32; the probabilities in fp32 and
    their sums in fp64 (sampling/logits.py). Twice, for the pool of the CUDA graphs."""
    rows = 1 + (e.cfg_scale != 1)
    return 2 * logits_per_token(m, 1) * (rows * (ELEMENT[dtype] + 4) + 4 + 4 + 8)


# The tokenizer (tokenizer/vq.py) -------------------------------------------------------------------------------------
def _block(c_in: int, c_out: int) -> int:
    """Weights of a residual block."""
    shortcut = (c_in + 1) * c_out if c_in != c_out else 0
    return 2 * c_in + (9 * c_in + 1) * c_out + 2 * c_out + (9 * c_out + 1) * c_out + shortcut


def tokenizer_elements(t: TokenizerConfig) -> int:
    """Weights of encoder, decoder and codebook."""
    width, mult, E = t.channels, t.channel_multipliers, t.codebook_embed_dim
    top = width * mult[-1]

    def attention(c: int) -> int:
        return 2 * c + 4 * (c + 1) * c

    total = 2 * (2 * _block(top, top) + attention(top))
    total += (27 + 1) * width + 2 * top + (9 * top + 1) * t.z_channels  # the encoder's first and last layers
    total += (9 * t.z_channels + 1) * top + 2 * width * mult[0] + (9 * width * mult[0] + 1) * 3  # the decoder's
    total += (t.z_channels + 1) * E + (E + 1) * t.z_channels
    total += t.codebook_size * E if t.quantizer in ("vq", "ibq") else 0
    last = len(mult) - 1
    for current, blocks, order, lowest in (
        (width, t.res_blocks, mult, last),
        (top, t.res_blocks + 1, mult[::-1], 0),
    ):
        for i, m in enumerate(order):
            c = width * m
            total += _block(current, c) + (blocks - 1) * _block(c, c) + (i == lowest) * blocks * attention(c)
            total += (9 * c + 1) * c if i < last else 0  # to the next resolution
            current = c
    return total


def decoder_peak(t: TokenizerConfig) -> int:
    """Elements that the decoder holds at once for an image.

    A residual block holds its input, that of its level, and three tensors of its output's width; the change of resolution
    the input of its level, its own, the enlarged one and the result.
    """
    mult, peak = t.channel_multipliers, 0
    current = t.channels * mult[-1]
    for i in reversed(range(len(mult))):
        c, pixels = t.channels * mult[i], (t.image_size >> i) ** 2
        change = current + c + 2 * 4 * c if i else 0
        peak = max(peak, pixels * max(current + max(2 * current, current + c, 3 * c), current + 4 * c, change))
        current = c
    return peak
