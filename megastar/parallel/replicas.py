"""Data parallelism of a network that fits on each rank: replicas whose gradients are averaged by plain all-reduces.

Each rank has an equal part of the global batch, so a mean over the batch is the mean over ranks of the ranks' means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megastar.parallel.collectives import gather_rows
from megastar.parallel.tensor_hash import hash_tensor

BUCKET = 32 << 20  # bytes of gradients in one all-reduce


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold replicas; without arguments one process, where every function returns its input."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    def part(self, rows: int) -> slice:
        """This rank's rows of a global batch; the ranks' parts are in rank order. ``rows`` is a multiple of ``world``."""
        assert rows % self.world == 0, f"{rows} rows on {self.world} ranks"
        size = rows // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the ranks. The same parameters have gradients on all ranks."""
        if self.world == 1:
            return
        pending = []
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = _flatten_dense_tensors(bucket)
            pending.append((bucket, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            flat.div_(self.world)
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))

    @torch.no_grad()
    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x`` over the ranks, on all of them. Without a gradient."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` over the ranks, with its gradient: for statistics of the global batch in a loss.

        The gradient is that of the mean of the ranks' losses, provided that ``average_gradients`` follows.
        """
        return _Mean.apply(x, self) if self.world > 1 else x

    def gather(self, x: Tensor) -> Tensor:
        """x (B / ranks, ...) -> (B, ...) in the order of the global batch, on all ranks. Without a gradient."""
        return gather_rows(x, self.group if self.world > 1 else None)

    @torch.no_grad()
    def from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, src=0, group=self.group)

    def all_equal(self, tensors: Iterable[Tensor]) -> bool:
        """Whether ``tensors`` have the same bits on all ranks; their hashes are compared."""
        if self.world == 1:
            return True
        hashes = torch.stack([hash_tensor(x.contiguous()) for x in tensors])[None]
        return bool((self.gather(hashes) == hashes).all())


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return replicas.sum(x) / replicas.world

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.replicas.sum(gradients[0]) / ctx.replicas.world, None


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    """Gradients of one dtype and of at most ``BUCKET`` bytes each, in order; a larger gradient has its own."""
    current: list[Tensor] = []
    size = 0
    for g in gradients:
        if current and (size + g.nbytes > BUCKET or g.dtype != current[0].dtype):
            yield current
            current, size = [], 0
        current.append(g)
        size += g.nbytes
    if current:
        yield current
