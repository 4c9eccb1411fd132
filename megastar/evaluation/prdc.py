"""Precision and recall by k-nearest-neighbour manifolds (Kynkaanniemi et al. 2019), as in ADM's evaluator.

ADM computes squared distances in half precision where they do not overflow, here they are float64. A point near the
surface of a ball may be inside in one and outside in the other: differences in the third decimal are ADM's rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BYTES = 1 << 28  # of one block of distances


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Features (N, F), (M, F) -> share of ``made`` inside the real manifold, share of ``real`` inside the made one.

    A manifold is the union of the balls around its points whose radius is the distance to the k-th nearest other point.
    Both sets must have more than ``k`` points. Memory: one block of distances, not N x M.
    """
    assert min(len(real), len(made)) > k, f"{k} neighbours of {len(real)} and {len(made)} points"
    real, made = real.double(), made.double()
    real_radii, made_radii = manifold_radii(real, k), manifold_radii(made, k)
    inside_real = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    inside_made = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for first, distances in _blocks(real, made):  # (b, M)
        rows = slice(first, first + len(distances))
        inside_real |= (distances <= real_radii[rows, None]).any(0)
        inside_made[rows] = (distances <= made_radii).any(1)
    return inside_real.double().mean().item(), inside_made.double().mean().item()


def manifold_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each point (N, F) to its k-th nearest other one: (N,)."""
    radii = x.new_empty(len(x))
    for first, distances in _blocks(x, x):
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, first + rows] = 0  # a point's distance to itself, above 0 due to rounding
        radii[first : first + len(distances)] = distances.topk(k + 1, dim=1, largest=False).values[:, k]
    return radii


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances (rows, M)) of blocks of rows of ``a`` (N, F) to all rows of ``b`` (M, F)."""
    rows = max(1, BYTES // (len(b) * b.element_size()))
    norms = b.square().sum(1)
    for first in range(0, len(a), rows):
        block = a[first : first + rows]
        yield first, (block.square().sum(1)[:, None] + norms).addmm_(block, b.T, alpha=-2).clamp_(min=0)
