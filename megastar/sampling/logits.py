"""From logits to one token: temperature, top-k, top-p, and the inverse of the distribution function."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest of (B, V) to minus infinity; ties with the k-th stay; 0 or k >= V keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable tokens of (B, V) until their mass exceeds p, the one that crosses p included."""
    if p >= 1:
        return logits
    # Stable: equal logits, frequent in bf16, keep one order whatever the batch. float64: 16,384 fp32 sums drift.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1)
    before = mass.cumsum(-1) - mass  # of all tokens that are more probable; 0 for the first, so one always stays
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(removed, -torch.inf)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) -> probabilities (B, V) fp32: temperature, then top-k, then top-p, as LlamaGen's ``sample``."""
    logits = logits.float() / temperature
    return keep_top_p(keep_top_k(logits, top_k), top_p).softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: the first whose cumulated probability exceeds the row's uniform number.

    probs (B, V), uniform (B,) float64 in [0, 1) -> (B,) int64. One number a token, so a sample's noise is T numbers
    whatever the vocabulary; float64 sums, so that only a near tie can turn on rounding.
    """
    mass = probs.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    # Just below the total at most, should the product round up: so the token found always has some probability.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)  # NaN: the caller's
