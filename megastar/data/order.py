"""The order of samples: pure functions of the seed and the position, never of ranks, workers or speed.

A position is the number of samples that the run has consumed. An epoch permutes the shards. With at most ``window``
shards, all samples are permuted together. Otherwise a window slides over the shards: each shard's samples are permuted
and cut into ``window`` nearly equal parts, part j of the shard at place r goes to slot r + j, and each slot's samples
are permuted together::

    window 3     slot  0   1   2   3   4   ...
    shard at place 0  [0] [1] [2]
    shard at place 1      [0] [1] [2]
    shard at place 2          [0] [1] [2]

So the first batch needs one shard, each slot starts one shard and finishes another, and no slot needs more than
``window``. Memory does not grow with the number of samples: an epoch takes a few numbers a shard, a batch the slots it
spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

VERSION = 2  # of the order: a run keeps the one it started with. 1 mixed blocks of ``window`` shards
_SHARDS, _SLOT, _SHARD, _CUTS = 0, 1, 2, 3  # independent random streams


@dataclass(frozen=True, eq=False)  # compared by identity: hashing 100,000 sizes a batch is slow
class OrderSpec:
    """Everything the order of a run depends on."""

    seed: int
    shard_sizes: tuple[int, ...] | np.ndarray  # samples of each shard
    window: int  # shards whose samples are mixed

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.asarray(self.shard_sizes, np.int64)  # (shards,)

    @cached_property
    def starts(self) -> np.ndarray:
        """The id of each shard's first sample, (shards,) int64."""
        starts: np.ndarray = np.cumsum(self.sizes) - self.sizes
        return starts

    @cached_property
    def samples(self) -> int:
        return int(self.sizes.sum())


def _raw(n: int, *key: int) -> np.ndarray:
    """n seeded uint64: raw PCG64 output, which is the same in every version of numpy."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)


def permutation(n: int, *key: int) -> np.ndarray:
    """A seeded permutation of range(n)."""
    return np.argsort(_raw(n, *key), kind="stable")


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The plan of one epoch: its S non-empty shards in order, and the slots (one, if no window slides)."""

    shards: np.ndarray  # (S,) int32
    sliding: bool
    cuts: np.ndarray  # (S,) int32: rounding offset of a shard, so that tiny shards do not all fall into the same part
    ends: np.ndarray  # (slots,) int64: place in the epoch after each slot's last sample

    def part(self, spec: OrderSpec, place: int | np.ndarray, j: int | np.ndarray) -> np.ndarray:
        """Where part ``j`` of the shard at ``place`` begins in its permutation: the parts tile its samples."""
        n, cut = spec.sizes[self.shards[place]], self.cuts[place]
        start: np.ndarray = (j * n + cut) // spec.window
        return start


@lru_cache(maxsize=4)  # a batch spans one epoch or two; reading ahead may need a third
def _epoch(spec: OrderSpec, epoch: int) -> _Epoch:
    shards = permutation(len(spec.shard_sizes), spec.seed, epoch, _SHARDS)
    shards = shards[spec.sizes[shards] > 0].astype(np.int32)
    S, W = len(shards), spec.window
    if S <= W:
        return _Epoch(shards, False, np.zeros(S, np.int32), np.array([spec.samples]))
    cuts = (_raw(S, spec.seed, epoch, _CUTS) % np.uint64(W)).astype(np.int32)
    plan = _Epoch(shards, True, cuts, np.zeros(S + W - 1, np.int64))
    places, sizes = np.arange(S), plan.ends
    for j in range(W):
        sizes[j : j + S] += plan.part(spec, places, j + 1) - plan.part(spec, places, j)
    np.cumsum(sizes, out=sizes)
    return plan


@lru_cache(maxsize=128)
def _shard_order(spec: OrderSpec, epoch: int, shard: int) -> np.ndarray:
    """The ids of a shard's samples in this epoch's order; its parts belong to different slots."""
    ids: np.ndarray = spec.starts[shard] + permutation(int(spec.shard_sizes[shard]), spec.seed, epoch, _SHARD, shard)
    return ids


@lru_cache(maxsize=8)
def _slot(spec: OrderSpec, epoch: int, slot: int) -> np.ndarray:
    """The ids of a slot's samples in order, int64, read-only."""
    plan = _epoch(spec, epoch)
    if not plan.sliding:
        pieces = [np.arange(spec.starts[s], spec.starts[s] + spec.sizes[s]) for s in plan.shards]
    else:
        pieces = []
        for place in range(*_places(spec, plan, slot)):
            j = slot - place
            first, last = int(plan.part(spec, place, j)), int(plan.part(spec, place, j + 1))
            pieces.append(_shard_order(spec, epoch, int(plan.shards[place]))[first:last])
    ids: np.ndarray = np.concatenate(pieces)
    ids = ids[permutation(len(ids), spec.seed, epoch, _SLOT, slot)]
    ids.flags.writeable = False
    return ids


def _places(spec: OrderSpec, plan: _Epoch, slot: int) -> tuple[int, int]:
    """The range of places of a slot's shards."""
    if not plan.sliding:
        return 0, len(plan.shards)
    return max(0, slot - spec.window + 1), min(slot + 1, len(plan.shards))


def slot_of(spec: OrderSpec, position: int) -> tuple[int, int]:
    """(epoch, slot) of sample ``position`` of the run."""
    epoch, place = divmod(position, spec.samples)
    return epoch, int(np.searchsorted(_epoch(spec, epoch).ends, place, side="right"))


def shards_from(spec: OrderSpec, position: int) -> Iterator[int]:
    """The shards needed from sample ``position`` of the run on, in order of first use; endless.

    The first ones are all shards of the position's slot; empty shards are left out.
    """
    epoch, slot = slot_of(spec, position)
    plan = _epoch(spec, epoch)
    first = _places(spec, plan, slot)[0]
    while True:
        for place in range(first, len(plan.shards)):
            yield int(plan.shards[place])
        epoch, first = epoch + 1, 0
        plan = _epoch(spec, epoch)


def sample_ids(spec: OrderSpec, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (count,) and epochs (count,), int64, of the samples from ``position`` of the run on; a batch may
    span epochs."""
    ids, epochs, filled = np.empty(count, np.int64), np.empty(count, np.int64), 0
    while filled < count:
        epoch, slot = slot_of(spec, position + filled)
        members, end = _slot(spec, epoch, slot), int(_epoch(spec, epoch).ends[slot])
        within = (position + filled) % spec.samples - (end - len(members))
        piece = members[within : within + count - filled]
        ids[filled : filled + len(piece)], epochs[filled : filled + len(piece)] = piece, epoch
        filled += len(piece)
    return ids, epochs
