"""Collectives with the group as an argument."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gather_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x (B, ...) of every rank of ``group`` -> (B * ranks, ...), rows in rank order, without a gradient.

    Without a group, or with a group of one: x itself, detached. All ranks must have the same shape.
    """
    x = x.detach()
    if group is None or dist.get_world_size(group) == 1:
        return x
    x = x.contiguous()
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x, group=group)
    return out
