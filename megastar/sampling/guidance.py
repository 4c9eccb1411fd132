"""Classifier-free guidance: conditional and null rows in one doubled batch, the conditional half first."""

from __future__ import annotations

import torch
from torch import Tensor


def doubled_labels(labels: Tensor, null_class: int) -> Tensor:
    """(B,) -> (2B,): the labels, then as many null classes."""
    return torch.cat([labels, torch.full_like(labels, null_class)])


def guide(logits: Tensor, scale: float) -> Tensor:
    """Logits of a doubled batch (2B, V) -> u + (c - u) * scale, (B, V). Source: LlamaGen generate.py."""
    conditional, null = logits.chunk(2)
    return null + (conditional - null) * scale


def is_guided(position: int, cfg_scale: float, cfg_interval: int) -> bool:
    """Whether the token at ``position`` (counted from 0) is drawn with guidance.

    LlamaGen's rule: it counts the tokens after the first from 0 and stops guiding beyond ``cfg_interval``; the first
    is always guided, and -1 guides all.
    """
    return cfg_scale > 1 and (cfg_interval < 0 or position - 1 <= cfg_interval)
