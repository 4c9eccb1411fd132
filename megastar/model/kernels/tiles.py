"""Which tiles of the (query, key) matrix a kernel has to visit, and which of them need no mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.masks import MaskSpec


class Tiles(NamedTuple):
    """For each tile of one side, the tiles of the other side to visit: fully visible ones first, then partly visible ones.

    R is B, or 1 if all sequences share the mask; n tiles on this side, m on the other. int32.
    """

    full: Tensor  # (R, n): how many are fully visible
    visited: Tensor  # (R, n): how many are visible at all
    order: Tensor  # (R, n, m): their numbers


def tiles(spec: MaskSpec, size: int, queries: int, keys: int, device: torch.device) -> tuple[Tiles, Tiles]:
    """For tiles of ``queries`` x ``keys``: the key tiles of each query tile, and the query tiles of each key tile."""

    def make() -> tuple[Tiles, Tiles]:
        states = tile_states(spec.to(device), size, queries, keys, device)
        return _listed(states), _listed(states.transpose(1, 2))

    return spec.cached(("tiles", size, queries, keys, device), make)


def tile_states(spec: MaskSpec, size: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(R, query tiles, key tiles) int8: 0 fully visible, 1 partly, 2 not at all. Exact for intervals.

    Of a window only the rows are considered: a tile that it may cut counts as partly visible. An incomplete last key tile
    is never full, so only tiles with a mask have to check the end of the sequence.
    """
    first = torch.arange(0, size, queries, device=device)[:, None]  # (n, 1)
    last = (first + queries).clamp(max=size) - 1
    j = torch.arange(size, device=device)
    start = j[None, None] if spec.start is None else spec.start[:, None]  # (R, 1, S)
    end = torch.full_like(start, size) if spec.end is None else spec.end[:, None]
    some = (start <= last) & (end > torch.maximum(first, start))  # (R, n, S)
    whole = (start <= first) & (end > last)
    pad = (0, -size % keys)
    some = F.pad(some, pad).unflatten(-1, (-1, keys)).any(-1)
    whole = F.pad(whole, pad).unflatten(-1, (-1, keys)).all(-1)
    if spec.window is not None:
        w = spec.window
        low = j[::keys]
        high = (low + keys).clamp(max=size) - 1
        above = (first.clamp(min=1) - 1) // w.width - (high - 1) // w.width  # rows from the keys' last to the queries'
        below = (low.clamp(min=1) - 1) // w.width - (last - 1) // w.width
        some = some & ((first == 0) | (low == 0) | ((above <= w.rows) & (below <= w.rows)))
        whole = torch.zeros_like(whole)
    return torch.where(whole, 0, torch.where(some, 1, 2)).to(torch.int8)


def _listed(states: Tensor) -> Tiles:
    order = states.argsort(dim=-1, stable=True).to(torch.int32)
    full, visited = (states == 0).sum(-1, dtype=torch.int32), (states < 2).sum(-1, dtype=torch.int32)
    return Tiles(full.contiguous(), visited.contiguous(), order.contiguous())
