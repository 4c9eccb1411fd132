"""Keys and values of the tokens already drawn, in buffers that are allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from megastar.config.schema import ModelConfig


class KVCache:
    """Static buffers (n_layer, B, H, max_len, d); attention reads only the prefix that has been written.

    A forward pass may carry fewer than ``batch`` rows: it uses the first ones. So the null half, which lies behind the
    conditional half, can be dropped in the middle of a sample.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (n_layer, batch, heads, max_len, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @classmethod
    def for_model(cls, c: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> KVCache:
        """A cache for ``batch`` sequences of the whole length T."""
        return cls(c.n_layer, batch, c.n_head, c.image_tokens, c.head_dim, dtype, device)

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def update(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, S, d) at positions start..start+S-1 of block ``layer``, counted from 0.

        Returns the keys and values of positions 0..start+S-1, each (B, H, start+S, d): views, not copies.
        """
        rows, end = k.shape[0], start + k.shape[2]
        assert end <= self.keys.shape[3], f"position {end} of a cache of {self.keys.shape[3]}"
        assert rows <= self.keys.shape[1], f"{rows} rows in a cache of {self.keys.shape[1]}"
        self.keys[layer, :rows, :, start:end] = k
        self.values[layer, :rows, :, start:end] = v
        return self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]
