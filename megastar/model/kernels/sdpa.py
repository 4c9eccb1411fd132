"""Attention by torch's fused kernel, or by two matrix products where those are faster (bf16 on CPU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.masks import MaskSpec


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, always causal.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions, so one query sees
    all keys. ``mask`` needs S = L. Returns (B, H, S, d).
    """
    queries, keys = q.shape[2], k.shape[2]
    bias = None
    if mask is not None and not mask.is_plain_causal:
        assert queries == keys, "hidden keys are for training: no cache"
        bias = mask.additive(keys, q.device, q.dtype)  # (B, 1, S, S)
    by_products = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if bias is None and queries > 1 and (by_products or queries != keys):
        bias = _causal(keys, q.device, q.dtype)[..., -queries:, :]
    if by_products:
        # torch's fused CPU kernel is four times slower here (64 positions, forward and backward).
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, S, L)
        return torch.softmax(logits if bias is None else logits.add_(bias), -1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and queries > 1)


_plain = MaskSpec()


def _causal(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # cached: one first made while sampling must serve training too
        return _plain.additive(size, device, dtype)
