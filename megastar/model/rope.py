"""2-D rotary position embedding as in LlamaGen (autoregressive/models/gpt.py): B batch, S sequence, H heads, d head dimension."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megastar.model import fused


@lru_cache(maxsize=32)
def rope_table(
    grid: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """cos and sin of each position's angles: (1 + grid * grid, d / 2, 2), LlamaGen's layout.

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
        return torch.view_as_real(torch.from_numpy(table)).to(device, dtype)


def split_qkv(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, S, 3, H, d) -> q and k, rotated, and v: (B, H, S, d) each. On a GPU by one kernel (fused.py).

    table (S, d / 2, 2) for all sequences, or (1 or 2, B or 1, 1, S, d / 2, 2): rows of each sequence, common to q and k or
    one set for each (token_order.py), which the kernel does not read: torch's operations are used.
    """
    if not torch.compiler.is_compiling():
        return plain_split_qkv(qkv, table) if table.ndim > 3 else fused.split_qkv(plain_split_qkv, qkv, table)
    # The compiler generates no complex code. As products of reals, q and k separate and in the layout of qkv, it needs one
    # kernel for each, without a copy before the attention kernel, and one for the gradient of qkv.
    q, k, v = qkv.unbind(2)
    of_q, of_k = (table, table) if table.ndim == 3 else (table[0, :, 0], table[-1, :, 0])  # (B or 1, S, d / 2, 2)
    return real_rope(q, of_q).transpose(1, 2), real_rope(k, of_k).transpose(1, 2), v.transpose(1, 2)


def real_rope(x: Tensor, table: Tensor) -> Tensor:
    """x (B, S, H, d), as ``apply_rope``; rows of each sequence (B or 1, S, d / 2, 2) too."""
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))  # (B, S, H, d / 2, 2)
    rows = table.unsqueeze(-3)
    cos, sin = rows[..., :1], rows[..., 1:]
    sign = torch.arange(2, device=x.device) * 2 - 1
    return (pairs * cos + pairs.flip(-1) * (sin * sign)).flatten(-2).to(x.dtype)


def plain_split_qkv(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, H, S, d), (1, B, H, S, d)
    q, k = apply_rope(qk, table).unbind()
    return q, k, v.squeeze(0)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i + 1]) by the table's rows (S, d / 2, 2), or more dimensions that broadcast.

    x (..., S, d) with a contiguous last dimension -> the same shape and dtype; arithmetic in fp32 (fp64 for fp64 inputs).
    """
    # The cast copies anyway: it also puts heads before positions, as the attention products need.
    wide = x if x.dtype == table.dtype else x.to(table.dtype, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (..., S, d / 2)
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).to(x.dtype)
