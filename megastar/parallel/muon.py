"""Which matrices Muon orthogonalizes, on which rank, and what that costs. Pure functions of shapes, no torch.

A rank owns whole matrices: it receives the parts that other ranks hold, runs the Newton-Schulz iterations, and sends the
parts back. Legend: A x B a matrix, A rows (outputs), m <= n its sides in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

from megastar.config.sections.optim import MuonConfig
from megastar.parallel.plan import block_matrix

SLACK = 0.1
BUCKET = 1 << 25  # elements that a rank owns in a bucket, at most; a larger matrix has a bucket of its own


@dataclass(frozen=True)
class Matrix:
    """Part ``part`` of the weight ``weight``: the whole weight, or one of q, k, v. ``rows`` x ``columns`` over all tensor
    ranks; ``by_rows``: tensor ranks hold rows of it, else columns."""

    weight: str
    part: int
    rows: int
    columns: int
    by_rows: bool

    @property
    def size(self) -> int:
        return self.rows * self.columns


def matrices_of(weight: str, shape: Sequence[int], split_qkv: bool) -> list[Matrix]:
    """The matrices of a block's weight whose whole shape is ``shape``."""
    split = block_matrix(weight)
    assert split is not None, weight
    parts = split.fused if split_qkv else 1
    rows, columns = shape
    return [Matrix(weight, i, rows // parts, columns, split.partition == "column") for i in range(parts)]


def all_matrices(shapes: Mapping[str, Sequence[int]], split_qkv: bool) -> list[Matrix]:
    """Every matrix among the weights ``shapes`` (name -> whole shape), in their order."""
    return [m for name, shape in shapes.items() if block_matrix(name) for m in matrices_of(name, shape, split_qkv)]


def newton_schulz_flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of ``steps`` iterations: two products m x n x m and one m x m x m each."""
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m**3)


def lr_factor(adjust_lr_fn: str, rows: int, columns: int) -> float:
    """By what the learning rate of a matrix is multiplied; ``torch.optim.Muon``'s adjust_lr_fn."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, columns))
    assert adjust_lr_fn == "original", adjust_lr_fn
    return sqrt(max(1, rows / columns))


def owners(costs: Sequence[int], ranks: int, held: Sequence[Mapping[int, int]] = ()) -> list[int]:
    """The rank that owns each matrix, by ``costs``; longest first, each to the least loaded rank.

    ``held``: for each matrix rank -> elements that the rank holds. A matrix goes to the rank that holds most of it, which
    then receives less, where that costs the most loaded rank at most ``SLACK`` more.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def assign(most: float) -> tuple[list[int], list[int]]:
        out, loads = [0] * len(costs), [0] * ranks
        for i in order:
            rank = min(range(ranks), key=loads.__getitem__)
            holders = held[i] if held else {}
            fitting = [r for r in holders if loads[r] + costs[i] <= most]
            if fitting:
                rank = min(fitting, key=lambda r: (-holders[r], loads[r], r))
            out[i] = rank
            loads[rank] += costs[i]
        return out, loads

    balanced, loads = assign(-1)
    most = (1 + SLACK) * max(loads, default=0)
    near, near_loads = assign(most)
    return near if max(near_loads, default=0) <= most else balanced


def owner_flops(shapes: Mapping[str, Sequence[int]], muon: MuonConfig, ranks: int) -> tuple[int, int]:
    """Floating-point operations of a step's Newton-Schulz iterations: (of all ranks, of the most loaded one)."""
    found = all_matrices(shapes, muon.split_qkv)
    costs = [newton_schulz_flops(m.rows, m.columns, muon.ns_steps) for m in found]
    loads = [0] * ranks
    for owner, cost in zip(owners(costs, ranks), costs, strict=True):
        loads[owner] += cost
    return sum(costs), max(loads)


class MuonTraffic(NamedTuple):
    """Of a step: elements that a rank sends to owners (``collect``) and from the matrices that it owns (``spread``), calls of
    each, and elements of a bucket that a rank owns and holds."""

    collect: float
    spread: float
    buckets: int
    owned: float
    held: float


def muon_traffic(
    shapes: Mapping[str, Sequence[int]], muon: MuonConfig, tensor: int, data: int, replicated: bool
) -> MuonTraffic:
    """On ``tensor`` x ``data`` ranks; ``replicated``: data ranks hold equal weights (ZeRO stage 0).

    Averages over ranks, with owners that hold no more than others of what they own: at stages 1 and 2, where a rank holds
    whole matrices, less is sent.
    """
    found = all_matrices(shapes, muon.split_qkv)
    size, ranks = sum(m.size for m in found), tensor * data
    largest = max((m.size for m in found), default=0)
    owned = max(size / ranks, largest)
    buckets = max(1, ceil(owned / BUCKET))
    if replicated:
        collect, spread, held = size / ranks * (1 - 1 / tensor), size / ranks * (data - 1 / tensor), size / tensor
    else:
        collect = spread = size / ranks * (1 - 1 / ranks)
        held = size / ranks
    return MuonTraffic(collect, spread, buckets, owned / buckets, held / buckets)


def working_bytes(traffic: MuonTraffic, element: int, alone: bool) -> int:
    """Temporary memory of the exchange (engine/zero/matrix_exchange.py): the matrices of a bucket, three copies of them in the
    iterations, the updates in fp32; with several ranks (not ``alone``) also what is sent and received, and the next bucket.
    """
    size = 4 * element * traffic.owned + 4 * traffic.held * (element < 4)
    if not alone:
        size += 2 * element * (traffic.owned + traffic.held) + element * traffic.owned * (traffic.buckets > 1)
    return round(size)
