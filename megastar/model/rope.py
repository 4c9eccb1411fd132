"""2-D rotary position embedding as in LlamaGen (autoregressive/models/gpt.py): S sequence, H heads, d head dimension."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=32)
def rope_table(
    grid: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.complex64
) -> Tensor:
    """cos + i sin of each position's angles: (1 + grid * grid, d / 2), complex.

    Row 0, the class position, is zero (cos *and* sin), so its query and key are zero; row 1 + p is token p of the
    raster scan. The first half of the pairs is rotated by the token's row, the second half by its column.
    A cached tensor and not a buffer: it must keep full precision when weights are cast, and DeepSpeed must not
    shard it. Built by numpy because ``zero.Init`` redirects torch's constructors.
    """
    half = head_dim // 2
    frequencies = base ** (-np.arange(0, half, 2) / half)  # (d / 4,)
    angles = np.arange(grid)[:, None] * frequencies  # (grid, d / 4)
    rows = np.broadcast_to(angles[:, None], (grid, grid, half // 2))
    columns = np.broadcast_to(angles[None], (grid, grid, half // 2))
    turns = np.exp(1j * np.concatenate([rows, columns], -1)).reshape(grid * grid, half)
    table = np.concatenate([np.zeros((1, half)), turns])
    with torch.inference_mode(False):  # a table built while sampling must be usable in training
        return torch.from_numpy(table).to(device, dtype)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i + 1]) by the table's rows (S, d / 2).

    x (..., S, d) with a contiguous last dimension -> the same shape and dtype; arithmetic in fp32 (fp64 for fp64 inputs).
    """
    real = torch.float64 if table.dtype == torch.complex128 else torch.float32
    # The cast copies anyway: it also puts heads before positions, as the attention products need.
    wide = x if x.dtype == real else x.to(real, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (..., S, d / 2)
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
