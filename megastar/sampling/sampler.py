"""Classes to codes to pictures: autoregressive sampling with a cache and guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.guidance import doubled_labels, guide, is_guided
from megastar.sampling.kv_cache import KVCache
from megastar.sampling.logits import draw, probabilities
from megastar.tokenizer.vq import VQModel


def sample_seeds(seed: int, count: int, start: int = 0) -> list[int]:
    """Seeds of samples start..start+count-1 of the run ``seed``: no two runs share one. Raises ``UserError``."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed}: give an integer from 0 to 2^64 - 1")
    return [(seed << 64) + i for i in range(start, start + count)]


def uniform_noise(seeds: Sequence[int], tokens: int) -> Tensor:
    """(N, T) float64 in [0, 1): row i is a function of seeds[i] only (Philox, a counter-based generator)."""
    rows = np.empty((len(seeds), tokens))
    for row, seed in zip(rows, seeds, strict=True):
        row[:] = (np.random.Philox(key=int(seed)).random_raw(tokens) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(rows)


def check_request(
    c: ModelConfig,
    labels: Tensor,
    seeds: Sequence[int],
    cfg_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    cfg_interval: int,
    batch: int,
) -> None:
    """Raises ``UserError`` with every problem of a request, one a line."""
    problems = []
    outside = labels[(labels < 0) | (labels >= c.num_classes)]
    if len(outside):
        problems.append(f"class {int(outside[0])} is outside 0..{c.num_classes - 1}, the classes this model knows")
    if len(seeds) != len(labels):
        problems.append(f"{len(seeds)} seeds for {len(labels)} classes: give one seed a sample")
    if any(not 0 <= s < 2**128 for s in seeds):
        problems.append("seeds must be integers from 0 to 2^128 - 1")
    if not (math.isfinite(cfg_scale) and cfg_scale >= 1):
        problems.append(f"cfg_scale {cfg_scale}: guidance starts at 1, which means none")
    if cfg_interval < -1:
        problems.append(f"cfg_interval {cfg_interval}: give -1 (guide every token) or a token number")
    if not (math.isfinite(temperature) and temperature > 0):
        problems.append(f"temperature {temperature} must be above 0; for the most probable token take top_k 1")
    if top_k < 0:
        problems.append(f"top_k {top_k} must be 0 (all codes) or more; {c.vocab_size} codes exist")
    if not 0 < top_p <= 1:
        problems.append(f"top_p {top_p} must lie above 0 and not above 1 (all codes)")
    if batch < 1:
        problems.append(f"batch {batch} must be at least 1")
    if problems:
        raise UserError("\n".join(problems))


@torch.no_grad()
def sample_tokens(
    model: Transformer,
    labels: Tensor | Sequence[int],
    *,
    seeds: Sequence[int],
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    batch: int = 64,
    progress: Console | None = None,
) -> Tensor:
    """Draw one picture's codes for each label: labels (N,) -> codes (N, T) int64 on the CPU.

    Sample i depends on labels[i] and seeds[i] only, not on ``batch`` or its neighbours, up to the rounding of matrix
    products of another size (in fp32 too small to matter; in bf16 a code may turn). ``cfg_scale`` 1 computes no null
    half; ``top_k`` 0 keeps all codes and a ``top_k`` above the vocabulary does too; ``cfg_interval`` as in
    ``guidance.is_guided``. ``progress`` is the console that shows a bar. Raises ``UserError`` (see check_request).
    """
    c = model.cfg
    labels = torch.as_tensor(labels, dtype=torch.long).cpu()
    check_request(c, labels, seeds, cfg_scale, temperature, top_k, top_p, cfg_interval, batch)
    weight = next(model.parameters())
    rows = min(batch, len(labels)) * (2 if cfg_scale > 1 else 1)
    cache = KVCache.for_model(c, rows, weight.dtype, weight.device)
    out = torch.empty(len(labels), c.image_tokens, dtype=torch.long)
    columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
    was_training = model.training
    model.eval()
    try:
        with Progress(*columns, console=progress, disable=progress is None) as bar:
            task = bar.add_task("", total=out.numel(), done=f"0/{len(labels)} pictures")
            for first in range(0, len(labels), batch):
                some = slice(first, first + batch)
                given = labels[some].to(weight.device)  # (B,)
                noise = uniform_noise(seeds[some], c.image_tokens).to(weight.device)  # (B, T)
                tokens = torch.empty_like(noise, dtype=torch.long)
                for position in range(c.image_tokens):
                    guided = is_guided(position, cfg_scale, cfg_interval)
                    logits = _next_logits(model, cache, given, tokens, position, guided)
                    logits = guide(logits, cfg_scale) if guided else logits
                    probs = probabilities(logits, temperature, top_k, top_p)
                    tokens[:, position] = draw(probs, noise[:, position])
                    bar.advance(task, len(given))
                out[some] = tokens.cpu()
                bar.update(task, done=f"{min(first + batch, len(labels))}/{len(labels)} pictures")
    finally:
        model.train(was_training)
    return out


def _next_logits(
    model: Transformer, cache: KVCache, labels: Tensor, tokens: Tensor, position: int, guided: bool
) -> Tensor:
    """Logits of the token at ``position``, (B, V), or (2B, V) when guided, in fp32."""
    if position == 0:
        if guided:
            labels = doubled_labels(labels, model.cfg.num_classes)
        empty = tokens.new_empty(len(labels), 0)
        output = model(labels, empty, cache=cache, start=0)
    else:
        last = tokens[:, position - 1 : position]  # (B, 1)
        output = model(None, torch.cat([last, last]) if guided else last, cache=cache, start=position)
    assert output.logits is not None
    return output.logits[:, -1].float()


def check_tokenizer(c: ModelConfig, tokenizer: VQModel) -> None:
    """Raises ``UserError`` unless the tokenizer can decode this model's codes."""
    t = tokenizer.config
    if t.codebook_size != c.vocab_size or t.grid**2 != c.image_tokens:
        raise UserError(
            f"the model draws {c.image_tokens} codes of {c.vocab_size}, the tokenizer has {t.grid**2} codes of "
            f"{t.codebook_size}: name the tokenizer whose codes the model was trained on"
        )


@torch.no_grad()
def decode_pictures(tokenizer: VQModel, codes: Tensor, batch: int = 64) -> np.ndarray:
    """Codes (N, T) -> pictures (N, H, W, 3) uint8."""
    device = next(tokenizer.parameters()).device
    side = tokenizer.config.image_size
    out = np.empty((len(codes), side, side, 3), dtype=np.uint8)
    for first in range(0, len(codes), batch):
        images = tokenizer.decode_codes(codes[first : first + batch].to(device))  # (B, 3, H, W)
        pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte()
        out[first : first + batch] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return out
