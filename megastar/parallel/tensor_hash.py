"""A 64-bit hash of a tensor's bits, for comparing tensors across ranks without sending them."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements hashed at a time: their int64 copies are small against a layer
ODD = 0x1E3779B97F4A7C15
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def hash_tensor(x: Tensor) -> Tensor:
    """Hash of the bits of ``x``, a scalar int64 on its device. A change of one element always changes it: each element
    is multiplied by an odd number that depends on its position, and int64 wraps."""
    bits = x.detach().reshape(-1).view(_INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, len(bits), CHUNK):
        part = bits[first : first + CHUNK]
        positions = torch.arange(first, first + len(part), device=x.device)
        total += (part.long() * (positions * (2 * ODD) | 1)).sum()
    return total
