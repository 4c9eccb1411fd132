"""Which sample comes when: pure functions of the seed, the step and the shard sizes, never of ranks or workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class OrderSpec:
    """What the order of a run depends on."""

    seed: int
    shard_sizes: tuple[int, ...]  # samples of each shard
    window: int  # shards that are mixed sample by sample

    @property
    def samples(self) -> int:
        return sum(self.shard_sizes)


def permutation(n: int, *key: int) -> np.ndarray:
    """A seeded permutation of range(n). Sorts raw PCG64 output, the part of numpy's generators that never changes."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


@lru_cache(maxsize=4)  # a batch looks at one epoch, at its end at two
def epoch_order(spec: OrderSpec, epoch: int) -> np.ndarray:
    """Every sample id once, (N,) int64, read-only.

    The shards are permuted, then cut into groups of ``window``, and each group's samples are permuted together:
    at any time only one group's shards are read.
    """
    starts = np.concatenate([[0], np.cumsum(spec.shard_sizes)])
    shards = permutation(len(spec.shard_sizes), spec.seed, epoch, 0)
    order = np.empty(spec.samples, np.int64)
    filled = 0
    for group in range(0, len(shards), spec.window):
        ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[group : group + spec.window]])
        order[filled : filled + len(ids)] = ids[permutation(len(ids), spec.seed, epoch, 1, group)]
        filled += len(ids)
    order.flags.writeable = False
    return order


def shards_from(spec: OrderSpec, position: int) -> Iterator[int]:
    """The shards that are read from sample ``position`` of the run on, in the order they are first touched in, endless.

    It begins with the whole group of ``window`` shards that the position lies in; shards without samples are left out.
    """
    epoch, place = divmod(position, spec.samples)
    while True:
        shards = permutation(len(spec.shard_sizes), spec.seed, epoch, 0)
        for group in range(0, len(shards), spec.window):
            members = [int(s) for s in shards[group : group + spec.window] if spec.shard_sizes[s]]
            size = sum(spec.shard_sizes[s] for s in members)
            if place < size:
                yield from members
            place = max(0, place - size)
        epoch, place = epoch + 1, 0


def batch_ids(spec: OrderSpec, step: int, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids (B,) and their epochs (B,) of step ``step``. A batch runs over the end of an epoch; none is dropped."""
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs, places = np.divmod(positions, spec.samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        ids[rows] = epoch_order(spec, int(epoch))[places[rows]]
    return ids, epochs
