"""Causal self-attention: fused qkv, 2-D RoPE, no bias. B batch, S sequence, D width, H heads, d head dimension."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from megastar.config.schema import ModelConfig
from megastar.model.kernels import AttentionPlan, Like, attention, plan
from megastar.model.layers import Dropout, Linear
from megastar.model.masks import MaskSpec
from megastar.model.rope import rope_table, split_qkv


class Cache(Protocol):
    """Keys and values of earlier positions, and the attention over them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Store k, v (B, H, S, d) at positions start..start + S - 1; causal attention of q (B, H, S, d) over all."""


def plan_attention(
    cfg: ModelConfig, mask: MaskSpec | None, batch: int, size: int, device: torch.device, dtype: torch.dtype
) -> AttentionPlan:
    """The attention of all blocks in one forward pass over (batch, size) positions.

    What a kernel is checked with at its first use are random numbers, in the layout in which the blocks pass q, k and v.
    """
    heads, d = cfg.n_head, cfg.head_dim

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(size + d)
        few = torch.randn(min(batch, 2), size, 3, min(heads, 2), d, generator=g).to(device, dtype)
        qkv = few.repeat(-(-batch // 2), 1, 1, -(-heads // 2), 1)[:batch, :, :, :heads].contiguous()
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return split_qkv(qkv, rope_table(cfg.grid, d, cfg.rope_base, device, kind)[:size])

    return plan(mask, Like((batch, heads, size, d), dtype, device), inputs, torch.is_grad_enabled())


class Attention(nn.Module):
    """x (B, S, D) -> (B, S, D)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wqkv = Linear(cfg.dim, 3 * cfg.dim, cfg.initializer_range)
        self.wo = Linear(cfg.dim, cfg.dim, cfg.initializer_range)
        self.resid_dropout = Dropout(cfg.resid_dropout_p)

    def forward(
        self,
        x: Tensor,
        *,
        rope: Tensor,
        mask: AttentionPlan | MaskSpec | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        start: int = 0,
    ) -> Tensor:
        # The number of heads follows from the width: a tensor-parallel rank has only some of them.
        qkv = self.wqkv(x).unflatten(-1, (3, -1, self.head_dim))  # (B, S, 3, H, d)
        q, k, v = split_qkv(qkv, rope)  # (B, H, S, d) each
        out = attention(q, k, v, mask) if cache is None else cache.attend(layer, q, k, v, start)  # (B, H, S, d)
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))
