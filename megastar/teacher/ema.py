"""The teacher's update: an exponential moving average of the student's fp32 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * values, in place, pair by pair.

    Averages must be fp32 or fp64: in bf16 a decay of 0.9999 would have no effect.
    """
    assert len(averages) == len(values)
    assert all(a.dtype in (torch.float32, torch.float64) for a in averages), "averages are kept in full precision"
    if averages:
        torch._foreach_lerp_(list(averages), list(values), 1 - decay)
