"""From logits to one token: temperature, top-k, top-p, and inverse transform sampling."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest of (B, V) to minus infinity; ties with the k-th are kept; 0 or k >= V keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most probable tokens of (B, V) until their mass exceeds p, including the one that crosses p."""
    if p >= 1:
        return logits
    # Stable: equal logits, frequent in bf16, have the same order in each batch. float64: 16,384 fp32 sums drift.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1)
    before = mass.cumsum(-1) - mass  # of all more probable tokens; 0 for the first, so at least one is kept
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(removed, -torch.inf)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) -> probabilities (B, V) fp32: temperature, then top-k, then top-p, as in LlamaGen's ``sample``."""
    logits = logits.float() / temperature
    return keep_top_p(keep_top_k(logits, top_k), top_p).softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row: the first whose cumulative probability exceeds the row's uniform number.

    probs (B, V), uniform (B,) float64 in [0, 1) -> (B,) int64. One number per token, so a sample needs T random numbers
    for any vocabulary; sums in float64, so rounding can change a token only near a tie.
    """
    mass = probs.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    # At most just below the total, even if the product rounds up: the selected token always has a probability above 0.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, threshold, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)  # NaN: see caller
