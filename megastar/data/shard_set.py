"""Reading token shards by position. A tar that was cut, even at a member boundary, where tar readers see a clean end,
no longer agrees with the manifest.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastar.config.schema import DataConfig
from megastar.data.files import sha256_of
from megastar.data.index import ShardIndex, pack_index, unpack_index
from megastar.data.manifest import MAX_CODEBOOK, Manifest, ShardInfo, parse_manifest
from megastar.data.samples import DTYPES, find_samples
from megastar.data.store import is_remote, open_store
from megastar.data.tar import AGAIN
from megastar.errors import UserError

RESIDENT = 96 << 20  # bytes of the maps that may count as this process's memory
_FAULT = 16  # log2 of the bytes that a page fault maps


@dataclass(frozen=True)
class _Open:
    """A mapped shard. A window is the codes of one view; they begin every ``stride`` bytes."""

    map: mmap.mmap
    index: ShardIndex
    windows: np.ndarray  # (positions,) void, a view of the map
    slot: int  # row of the tables


class ShardSet:
    """Random access to the samples of a folder of shards, or of ``s3://bucket/prefix`` (``data``: cache and patience).

    A sample's id is its place in the manifest's order: shard by shard, tar order within. At most ``max_open`` shards
    are mapped at once, and at most ``resident`` bytes of them are held as this process's memory (what is let go stays
    in the page cache). The event ``stop`` ends a wait for a shard with ``Stopped``. Not for several threads at once.
    """

    def __init__(
        self, folder: str | Path, *, data: DataConfig | None = None, max_open: int = 64, resident: int = RESIDENT
    ):
        self.folder = folder if is_remote(folder) else Path(folder)
        self.store = open_store(folder, data)
        self.manifest = m = parse_manifest(self.store)
        self.stop = threading.Event()
        self.starts = np.concatenate([[0], np.cumsum(m.shard_sizes, dtype=np.int64)])
        self._dtype = np.dtype(DTYPES[m.dtype])
        self._row = m.tokens * self._dtype.itemsize  # bytes of one view
        self._maps: OrderedDict[int, _Open] = OrderedDict()
        self._max_open = max(1, min(max_open, len(m.shards)))
        self._resident = resident
        # Of the open shards, by slot: what a batch of many shards needs is looked up at once.
        self._slots = np.full(len(m.shards), -1)
        self._first = np.empty((self._max_open, 0), np.int64)  # (slots, samples) window of the first view
        self._labels = np.empty((self._max_open, 0), np.int64)
        self._stride = np.ones(self._max_open, np.int64)  # (slots,) bytes between windows
        self._base = np.zeros(self._max_open, np.int64)  # (slots,) address of the map within a fault's bytes
        self._touched = np.zeros((self._max_open, 0), bool)  # (slots, faults): what is mapped by now

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, shard: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Sample ``sample`` of shard ``shard`` -> codes (views, T) uint16 (a view of the file), class, id."""
        data = self.open(shard)
        m, index = self.manifest, self._maps[shard].index
        codes = np.frombuffer(data, self._dtype, m.views * m.tokens, int(index.offsets[sample]))
        sample_id = int(self.starts[shard]) + sample
        return self._as_codes(codes.reshape(m.views, m.tokens)), int(index.labels[sample]), sample_id

    def gather(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids (B,), view numbers (B, M) -> codes (B, M, T) uint16, classes (B,) int64."""
        m, (B, M) = self.manifest, views.shape
        ids = np.asarray(ids, np.int64)
        assert ids.shape == (B,)
        codes = np.empty((B, M), f"V{self._row}")
        labels = np.empty(B, np.int64)
        if not codes.size:
            return np.empty((B, M, m.tokens), np.uint16), labels
        if ids.min() < 0 or ids.max() >= m.samples or views.min() < 0 or views.max() >= m.views:
            raise IndexError(f"a sample outside 0 to {m.samples - 1}, or a view outside 0 to {m.views - 1}")
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        rows = np.argsort(shards, kind="stable")  # shard by shard
        ordered = shards[rows]
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [B]])
        for group in range(0, len(cuts) - 1, self._max_open):  # as many shards as may be open at once
            ends = cuts[group : group + self._max_open + 1].tolist()
            part = rows[ends[0] : ends[-1]]
            self._gather(part, ordered, ends, ids[part], views[part], codes, labels)
        return self._as_codes(codes.view(self._dtype).reshape(B, M, m.tokens)), labels

    def _gather(
        self,
        rows: np.ndarray,
        ordered: np.ndarray,
        ends: list[int],
        ids: np.ndarray,
        views: np.ndarray,
        codes: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        """The rows (b,) of shards that can be open together: ``ordered[ends[k]:ends[k + 1]]`` are of one."""
        for end in ends[:-1]:
            self.open(int(ordered[end]))
        shards = ordered[ends[0] : ends[-1]]
        slots, samples = self._slots[shards], ids - self.starts[shards]
        labels[rows] = self._labels[slots, samples]
        stride = self._stride[slots]
        windows = (self._first[slots, samples])[:, None] + views * (self._row // stride)[:, None]  # (b, M)
        self._count(slots, windows * stride[:, None])
        for end, after in zip(ends[:-1], ends[1:], strict=True):
            span = slice(end - ends[0], after - ends[0])
            codes[rows[span]] = self._maps[int(ordered[end])].windows[windows[span]]

    def _count(self, slots: np.ndarray, offsets: np.ndarray) -> None:
        """Keep the memory in bounds, before the bytes at ``offsets`` (b, M) of the maps in ``slots`` (b,) are read."""
        if sum(len(o.map) for o in self._maps.values()) <= self._resident:
            return
        faults = (offsets + self._base[slots][:, None]) >> _FAULT
        self._touched[slots[:, None], faults] = True
        if np.count_nonzero(self._touched) << _FAULT > self._resident:
            for shard in self._maps.values():
                shard.map.madvise(mmap.MADV_DONTNEED)
            self._touched[:] = False
            self._touched[slots[:, None], faults] = True

    def _as_codes(self, codes: np.ndarray) -> np.ndarray:
        """Stored numbers -> uint16."""
        if self._dtype != np.uint16 and codes.size:
            if codes.min() < 0 or codes.max() >= MAX_CODEBOOK:
                raise UserError(
                    f"{self.folder} holds codes from {codes.min()} to {codes.max()}, outside the vocabulary of {self.manifest.codebook_size}: pretokenize again"
                )
            codes = codes.astype(np.uint16)
        return codes

    def where(self, sample_id: int) -> str:
        """ "shard-00003.tar, sample 17": for messages."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return f"{self.manifest.shards[shard].name}, sample {sample_id - int(self.starts[shard])}"

    def sources(self, shard: int) -> list[str]:
        """Name of the picture of each sample of a shard; the sample's key in sets that name none."""
        info, m = self.manifest.shards[shard], self.manifest
        where = self.store.where(info.name)
        return find_samples(self.open(shard), where, m.layout, m.expected, info.samples, sources=True).sources

    def close(self) -> None:
        """Drop the memory maps; arrays that still look into one keep it alive. Ends the reading ahead."""
        self._maps.clear()
        self._slots[:] = -1
        self._touched[:] = False
        self.store.close()

    def open(self, shard: int) -> mmap.mmap:
        """Map shard ``shard`` and check its size, its index and its count of samples.

        Raises ``UserError`` for a cut or changed file.
        """
        if (found := self._maps.get(shard)) is not None:
            self._maps.move_to_end(shard)
            return found.map
        info = self.manifest.shards[shard]
        slot = len(self._maps)
        if slot >= self._max_open:  # before the next one: a map keeps its shard in the cache
            former, closed = self._maps.popitem(last=False)
            slot, self._slots[former] = closed.slot, -1
            del closed
        else:
            slot = min(set(range(self._max_open)) - {o.slot for o in self._maps.values()})
        data = self._map(info)
        self._maps[shard] = self._seat(data, self._index(data, info), slot)
        self._slots[shard] = slot
        return data

    def _map(self, info: ShardInfo) -> mmap.mmap:
        with self.store.open(info, self.stop) as f:
            if (size := os.fstat(f.fileno()).st_size) != info.bytes or not size:
                raise UserError(
                    f"token shard {self.store.where(info.name)} has {size} bytes, the manifest says {info.bytes}: it was cut or changed, {AGAIN}"
                )
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def _index(self, data: mmap.mmap, info: ShardInfo) -> ShardIndex:
        """The kept index, or else one from a walk over the tar, whose own end mark proves nothing."""
        m = self.manifest
        index = unpack_index(self.store.index(info), info, m.layout, m.expected, data)
        if index is None:
            index = walk_shard(data, self.store.where(info.name), m, info)
            about = m.expected
            self.store.keep_index(info, pack_index(index, info, m.layout, about.dtype, about.views, about.tokens))
        return index

    def _seat(self, data: mmap.mmap, index: ShardIndex, slot: int) -> _Open:
        """Enter an opened shard into the tables."""
        if len(index.offsets) > self._first.shape[1]:
            more = (self._max_open, len(index.offsets) - self._first.shape[1])
            self._first = np.concatenate([self._first, np.zeros(more, np.int64)], axis=1)
            self._labels = np.concatenate([self._labels, np.zeros(more, np.int64)], axis=1)
        if (len(data) >> _FAULT) + 2 > self._touched.shape[1]:
            self._touched = np.zeros((self._max_open, (len(data) >> _FAULT) + 2), bool)
        stride = math.gcd(self._row, int(np.gcd.reduce(index.offsets)))  # of no samples: the row
        positions = (len(data) - self._row) // stride + 1 if len(data) >= self._row else 0
        windows = np.ndarray((positions,), f"V{self._row}", data, 0, (stride,))
        n = len(index.offsets)
        self._first[slot, :n], self._labels[slot, :n] = index.offsets // stride, index.labels
        self._stride[slot] = stride
        self._base[slot] = windows.ctypes.data & ((1 << _FAULT) - 1)
        self._touched[slot] = False
        return _Open(data, index, windows, slot)


def walk_shard(data: mmap.mmap, where: str, manifest: Manifest, info: ShardInfo) -> ShardIndex:
    """Find every sample of a shard by its headers. Raises ``UserError`` unless they are what the manifest says."""
    found = find_samples(data, where, manifest.layout, manifest.expected, info.samples)
    if (n := len(found.offsets)) != info.samples:
        raise UserError(
            f"token shard {where} holds {n} samples, the manifest says {info.samples}: it was cut or changed, {AGAIN}"
        )
    return ShardIndex(found.offsets, found.labels)


def verify(folder: str | Path) -> Manifest:
    """Read every shard and compare its SHA-256 with the manifest. Raises ``UserError`` naming the first that differs."""
    shards = ShardSet(folder)
    for number, info in enumerate(shards.manifest.shards):
        shards.open(number)
        with shards.store.open(info) as f:
            found = sha256_of(f)
        if found != info.sha256:
            raise UserError(
                f"token shard {shards.store.where(info.name)} has SHA-256 {found}, the manifest says {info.sha256}: it was changed, {AGAIN}"
            )
    return shards.manifest
