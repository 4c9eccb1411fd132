"""Moves matrices to the ranks that own them, and their updates back, in few large collectives.

Each rank holds parts of the blocks' weights: the elements of its ZeRO partition, of its tensor rank's weight. The owner of
a matrix (parallel/muon.py) receives all of it in one all-to-all per bucket, and sends each holder its elements of the result
in another. While a bucket is computed, the next one arrives. T is the number of tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.context import Context
from megastar.engine.zero.partitions import Shard
from megastar.parallel.collectives import gather_rows
from megastar.parallel.muon import BUCKET, Matrix, owners

Transform = Callable[[Tensor], Tensor]  # (matrices, rows, columns) -> the same


@dataclass(frozen=True)
class Held:
    """Elements of matrix ``matrix`` in this rank's tensor number ``flat``, from ``offset`` on."""

    matrix: int
    flat: int
    offset: int
    length: int


@dataclass
class Stack:
    """``count`` matrices of one shape that this rank owns, one after the other; each as T parts."""

    matrix: Matrix
    offset: int
    count: int

    def apply(self, whole: Tensor, tensor: int, transform: Transform) -> None:
        m, n = self.matrix, self.count
        flat = whole.narrow(0, self.offset, n * m.size)
        if m.by_rows or tensor == 1:
            flat.view(n, m.rows, m.columns).copy_(transform(flat.view(n, m.rows, m.columns)))
        else:  # each part has some columns
            parts = flat.view(n, tensor, m.rows, m.columns // tensor).transpose(1, 2)
            parts.copy_(transform(parts.reshape(n, m.rows, m.columns)).view(parts.shape))


@dataclass
class Route:
    """What this rank sends or receives of a bucket in one direction: elements that it holds, and ranges (first, length) of
    the matrices that it owns. The first ``local`` of both are the same elements and are not sent; the others are in the
    order of the other ranks, ``held_sizes`` and ``owned_sizes`` elements for each."""

    held: list[Held] = field(default_factory=list)
    owned: list[tuple[int, int]] = field(default_factory=list)
    local: int = 0
    held_sizes: list[int] = field(default_factory=list)
    owned_sizes: list[int] = field(default_factory=list)


@dataclass
class Bucket:
    size: int  # elements of the matrices that this rank owns
    stacks: list[Stack]
    collect: Route
    spread: Route


class MatrixExchange:
    """A collective; constructed on all ranks alike.

    Args:
        matrices: those that are exchanged at once, in one order on all ranks.
        costs: of computing each, to balance the owners.
        shards: this rank's parts of their weights.
        replicated: data ranks hold equal weights (ZeRO stage 0): only those of the owner's data rank send.
        dtype: type of what is sent and computed.
    """

    def __init__(
        self,
        ctx: Context,
        matrices: Sequence[Matrix],
        costs: Sequence[int],
        shards: Sequence[Shard],
        replicated: bool,
        dtype: torch.dtype,
    ):
        self.ctx, self.matrices, self.dtype, self.replicated = ctx, list(matrices), dtype, replicated
        self.flats = list({id(s.flat): s.flat for s in shards}.values())
        self.numbers = {id(flat): i for i, flat in enumerate(self.flats)}
        self.shards = {s.name: s for s in shards}
        self.group = dist.group.WORLD if ctx.world > 1 else None
        self.ranges = self._gather_ranges()
        held = [] if replicated else [self._holders(n) for n in range(len(self.matrices))]
        self.owner = owners(costs, ctx.world, held)
        self.buckets = [self._bucket(numbers) for numbers in self._numbers()]

    def part(self, number: int) -> int:
        """Elements of a matrix on one tensor rank."""
        return self.matrices[number].size // self.ctx.tensor

    def _gather_ranges(self) -> Tensor:
        """(ranks, matrices, 2): the elements first..last of its part of each matrix that a rank holds."""
        rows = []
        for n, m in enumerate(self.matrices):
            shard, size = self.shards.get(m.weight), self.part(n)
            edges = (shard.start, shard.stop) if shard else (0, 0)
            rows.append([min(max(edge - m.part * size, 0), size) for edge in edges])
        table = torch.tensor([rows], dtype=torch.int64, device=self.ctx.device)
        return gather_rows(table, self.group).cpu()

    def _holders(self, number: int) -> dict[int, int]:
        length = self.ranges[:, number, 1] - self.ranges[:, number, 0]
        return {rank: int(length[rank]) for rank in length.nonzero().flatten().tolist()}

    def _numbers(self) -> list[list[int]]:
        """The matrices of each bucket, on all ranks alike."""
        owned, out = [0] * self.ctx.world, []
        for number, owner in enumerate(self.owner):
            out.append((owned[owner] // BUCKET, number))
            owned[owner] += self.matrices[number].size
        return [[number for _, number in some] for _, some in groupby(sorted(out), key=lambda pair: pair[0])]

    def _bucket(self, numbers: list[int]) -> Bucket:
        def shape(number: int) -> tuple[int, int, bool]:
            m = self.matrices[number]
            return m.rows, m.columns, m.by_rows

        mine, size, stacks = [n for n in numbers if self.owner[n] == self.ctx.rank], 0, []
        first: dict[int, int] = {}  # where each begins in the buffer
        for _, some in groupby(sorted(mine, key=shape), key=shape):
            same = list(some)
            stacks.append(Stack(self.matrices[same[0]], size, len(same)))
            for number in same:
                first[number] = size
                size += self.matrices[number].size
        return Bucket(size, stacks, self._route(numbers, first, True), self._route(numbers, first, False))

    def _route(self, numbers: list[int], first: dict[int, int], collect: bool) -> Route:
        me, world, route = self.ctx.rank, self.ctx.world, Route()
        mine, theirs = [n for n in numbers if n in first], self.ranges[me].tolist()
        by_owner = {rank: [n for n in numbers if self.owner[n] == rank] for rank in {self.owner[n] for n in numbers}}
        for other in (me, *(r for r in range(world) if r != me)):
            held = [self._held(n, *theirs[n]) for n in by_owner.get(other, ()) if self._takes_part(me, n, collect)]
            owned = [self._owned(n, other, first[n]) for n in mine if self._takes_part(other, n, collect)]
            route.held += held
            route.owned += owned
            if other == me:
                route.local = len(held)
            route.held_sizes.append(sum(h.length for h in held) * (other != me))
            route.owned_sizes.append(sum(length for _, length in owned) * (other != me))
        for sizes in (route.held_sizes, route.owned_sizes):
            sizes.insert(me, sizes.pop(0))
        return route

    def _takes_part(self, rank: int, number: int, collect: bool) -> bool:
        """Whether ``rank`` sends (``collect``) or receives elements of a matrix."""
        low, high = self.ranges[rank, number].tolist()
        replica = rank // self.ctx.tensor != self.owner[number] // self.ctx.tensor
        return low < high and not (collect and self.replicated and replica)

    def _held(self, number: int, low: int, high: int) -> Held:
        m = self.matrices[number]
        shard = self.shards[m.weight]
        offset = shard.offset + m.part * self.part(number) + low - shard.start
        return Held(number, self.numbers[id(shard.flat)], offset, high - low)

    def _owned(self, number: int, rank: int, first: int) -> tuple[int, int]:
        low, high = self.ranges[rank, number].tolist()
        return first + rank % self.ctx.tensor * self.part(number) + low, high - low

    # A step ------------------------------------------------------------------------------------------------------
    def run(self, sources: Sequence[Tensor], transform: Transform) -> Iterator[tuple[list[Held], list[Tensor]]]:
        """Apply ``transform`` to the matrices in ``sources``, one for each of ``flats``: bucket by bucket the elements that
        this rank holds, and their values. A collective; the caller must take all."""
        arriving = self._collect(self.buckets[0], sources)
        leaving: Callable[[], list[Tensor]] | None = None
        for i, bucket in enumerate(self.buckets):
            whole = arriving()
            if i + 1 < len(self.buckets):
                arriving = self._collect(self.buckets[i + 1], sources)
            for stack in bucket.stacks:
                stack.apply(whole, self.ctx.tensor, transform)
            if leaving:
                yield self.buckets[i - 1].spread.held, leaving()
            leaving = self._spread(bucket, whole)
        assert leaving is not None
        yield self.buckets[-1].spread.held, leaving()

    def _collect(self, bucket: Bucket, sources: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Start; the function that is returned waits for the matrices that this rank owns, flat."""
        route, local = bucket.collect, bucket.collect.local
        held = [sources[h.flat].view(-1).narrow(0, h.offset, h.length) for h in route.held]
        whole = torch.empty(bucket.size, dtype=self.dtype, device=self.ctx.device)
        owned = [whole.narrow(0, *place) for place in route.owned]
        copy(owned[:local], held[:local])
        sent = self._buffer(route.held_sizes)
        copy(pieces(sent, held[local:]), held[local:])
        received, wait = self._exchange(sent, route.held_sizes, route.owned_sizes)

        def arrive() -> Tensor:
            wait()
            copy(owned[local:], pieces(received, owned[local:]))
            return whole

        return arrive

    def _spread(self, bucket: Bucket, whole: Tensor) -> Callable[[], list[Tensor]]:
        """Start; the function that is returned waits for the values of the elements that this rank holds."""
        route, local = bucket.spread, bucket.spread.local
        owned = [whole.narrow(0, *place) for place in route.owned]
        sent = self._buffer(route.owned_sizes)
        copy(pieces(sent, owned[local:]), owned[local:])
        received, wait = self._exchange(sent, route.owned_sizes, route.held_sizes)

        def arrive() -> list[Tensor]:
            wait()
            return owned[:local] + list(received.split([h.length for h in route.held[local:]]))

        return arrive

    def _buffer(self, sizes: list[int]) -> Tensor:
        return torch.empty(sum(sizes), dtype=self.dtype, device=self.ctx.device)

    def _exchange(self, sent: Tensor, sizes: list[int], theirs: list[int]) -> tuple[Tensor, Callable[[], Any]]:
        received = self._buffer(theirs)
        if self.group is None:
            return received, lambda: None
        # ``sent`` lives as long as the function that waits.
        work = dist.all_to_all_single(received, sent, theirs, sizes, group=self.group, async_op=True)
        return received, lambda: (work.wait(), sent)


def pieces(buffer: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return buffer.split([t.numel() for t in like]) if like else ()


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
