"""Random token order: where each token of a sequence lies on the grid, and which one its output predicts.

B sequences, T image tokens, S positions of a sequence. An order is a permutation of the grid's positions 0 .. T - 1 (row by
row): its entry t is the position of the token that output t predicts. Input 0 is the class, input t > 0 the token that
output t - 1 predicted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megastar.config.schema import ModelConfig
from megastar.model.rope import rope_table


class Placement(NamedTuple):
    """Of each input: its row of ``rope_table`` (0 is the class, 1 + p grid position p) and the grid position of the token
    to predict; (B or 1, S) int64 each."""

    own: Tensor
    target: Tensor

    @classmethod
    def of(cls, order: Tensor) -> Placement:
        """order (B, T) -> the placement of a whole sequence."""
        return cls(torch.cat([torch.zeros_like(order[:, :1]), 1 + order[:, :-1]], 1), order)

    @classmethod
    def raster(cls, start: int, size: int, device: torch.device) -> Placement:
        """Positions start .. start + size - 1 of a sequence in raster order."""
        positions = torch.arange(start, start + size, device=device)[None]
        return cls(positions, positions)


def placed_rope(cfg: ModelConfig, placement: Placement, device: torch.device, dtype: torch.dtype) -> Tensor:
    """RoPE's rows (1 or 2, B or 1, 1, S, d / 2, 2) for q and k (B, H, S, d): keys are turned by their own position;
    queries as well, or with ``target_position`` rotary by that of the token to predict."""
    table = rope_table(cfg.grid, cfg.head_dim, cfg.rope_base, device, dtype)
    own = table[placement.own]  # (B or 1, S, d / 2, 2)
    both = [table[1 + placement.target], own] if cfg.target_position == "rotary" else [own]
    return torch.stack(both).unsqueeze(2)


def inverse(order: Tensor) -> Tensor:
    """order (..., T) -> (..., T): the output that predicts each grid position."""
    return order.argsort(-1)


def slots_of(order: Tensor, positions: Tensor) -> Tensor:
    """The place in the sequence of the same image positions: order (B, M, T), positions (K,) in 1 .. T - 1 -> (B, M, K).

    Position k of a raster sequence holds token k - 1. In another order that token is input 1 + t, where output t predicts
    it. The last token of an order is never an input: there, the last input, which predicts it, is taken.
    """
    found = 1 + inverse(order)[..., positions.to(order.device) - 1]
    return found.clamp_(max=order.shape[-1] - 1)
