"""Classifier-free guidance: null rows after the conditional ones, and the guidance scale of each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("constant", "linear", "cosine")


def doubled_labels(labels: Tensor, null_class: int) -> Tensor:
    """(B,) -> (2B,): the labels, then as many null classes."""
    return torch.cat([labels, torch.full_like(labels, null_class)])


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Logits of a doubled batch (2B, ..., V) -> u + (c - u) * scale, (B, ..., V). Source: LlamaGen generate.py."""
    conditional, null = logits.chunk(2)
    return null + (conditional - null) * scale


def scales(tokens: int, cfg_scale: float, schedule: str = "constant", cfg_interval: int = -1) -> list[float]:
    """The guidance scale of each of the ``tokens`` positions; 1 means that the null logits are not used there.

    ``constant``: cfg_scale everywhere. ``linear`` and ``cosine``: from 1 at the first token to cfg_scale at the last,
    linearly or by half a cosine. ``cfg_interval`` as in LlamaGen: it counts the tokens after the first from 0 and
    disables guidance beyond ``cfg_interval``; the first is always guided, and -1 guides all.
    """
    assert schedule in SCHEDULES, schedule
    out = []
    for position in range(tokens):
        along = position / max(1, tokens - 1)
        share = {"constant": 1.0, "linear": along, "cosine": (1 - math.cos(math.pi * along)) / 2}[schedule]
        guided = cfg_interval < 0 or position - 1 <= cfg_interval
        out.append(1 + (cfg_scale - 1) * share if guided else 1.0)
    return out


def null_until(scale_of: list[float]) -> int:
    """The number of tokens for which null rows must be computed: up to the last guided one."""
    return max((position + 1 for position, scale in enumerate(scale_of) if scale != 1), default=0)
