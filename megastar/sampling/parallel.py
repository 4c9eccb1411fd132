"""The random order of each image's tokens in parallel decoding. T image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ORDER = 1  # counter of the order's random numbers; those of the tokens begin at 0


def random_orders(seeds: Sequence[int], tokens: int) -> Tensor:
    """(N, T) int64, a permutation of the grid's positions per row: row i depends on seeds[i] only (Philox's raw numbers,
    which are the same in every version of numpy)."""
    rows = np.empty((len(seeds), tokens), np.int64)
    for row, seed in zip(rows, seeds, strict=True):
        bits = np.random.Philox(key=int(seed), counter=[0, 0, 0, _ORDER]).random_raw(tokens)
        row[:] = np.argsort(bits, kind="stable")
    return torch.from_numpy(rows)
