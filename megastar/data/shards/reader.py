"""Random access to the samples of token shards, a batch at a time. A truncated tar is found by the manifest's numbers,
even if it was truncated at a member boundary, where tar readers see a clean end.
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
from typing import BinaryIO

import numpy as np

from megastar.config.schema import DataConfig
from megastar.data.shards.features import NUMPY, not_finite
from megastar.data.shards.index import ShardIndex, pack_index, unpack_index
from megastar.data.shards.manifest import Manifest, parse_manifest
from megastar.data.shards.sample_parser import DTYPES, code_type, find_samples
from megastar.data.shards.tar_reader import damaged
from megastar.data.storage.shard_info import ShardInfo
from megastar.data.storage.store import is_remote, open_store
from megastar.errors import UserError

RESIDENT = 128 << 20  # bytes of shards to read through maps, which count as memory of this process
_SAMPLES_AT_ONCE = 1024  # that are read into one buffer


@dataclass(frozen=True)
class _Open:
    """An open shard. A window is the codes of one view; a window starts every ``stride`` bytes."""

    file: BinaryIO
    version: tuple[int, ...]  # when it was verified
    map: mmap.mmap
    index: ShardIndex
    windows: np.ndarray  # (positions,) void, a view of the map
    stride: int
    slot: int  # row of the tables of ``ShardSet``


class ShardSet:
    """Random access to the samples of a folder of shards or ``s3://bucket/prefix`` (``data``: cache and patience).

    A sample's id is its position in the manifest's order: by shard, then in tar order. At most ``max_open`` shards are
    open at once. Up to ``resident`` bytes of open shards are read through their maps, more than that by one call a
    view, because mapping and dropping pages would cost several times as much. The event ``stop`` ends a wait for a
    shard with ``Stopped``. Not thread-safe.
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
        self._code_dtype = np.dtype(code_type(m.codebook_size))
        self._row = m.tokens * self._dtype.itemsize  # bytes of one view
        self._maps: OrderedDict[int, _Open] = OrderedDict()
        self._max_open = max(1, min(max_open, len(m.shards)))
        self._resident = resident
        # Tables of the open shards, by slot, so that a batch of many shards is looked up at once.
        self._slots = np.full(len(m.shards), -1)
        self._offsets = np.empty((self._max_open, 0), np.int64)  # (slots, samples)
        self._labels = np.empty((self._max_open, 0), np.int64)  # (slots, samples)
        self._buffer: tuple[np.ndarray, list[list[memoryview]]] | None = None

    def __len__(self) -> int:
        return self.manifest.samples

    def renew_stop(self) -> threading.Event:
        """A new event ``stop`` for the reads from now on; the former one keeps ending those under way."""
        self.stop = threading.Event()
        return self.stop

    def read(self, shard: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Sample ``sample`` of shard ``shard`` -> codes (views, T) of ``code_type`` (a view of the file),
        class, id."""
        data = self.open(shard)
        m, index = self.manifest, self._maps[shard].index
        codes = np.frombuffer(data, self._dtype, m.views * m.tokens, int(index.offsets[sample]))
        sample_id = int(self.starts[shard]) + sample
        return self._as_codes(codes.reshape(m.views, m.tokens)), int(index.labels[sample]), sample_id

    def gather(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids (B,), view numbers (B, M) -> codes (B, M, T) of ``code_type``, classes (B,) int64.

        Raises ``UserError`` for a code outside the codebook and a class outside those of the manifest.
        """
        m, (B, M) = self.manifest, views.shape
        ids = np.asarray(ids, np.int64)
        assert ids.shape == (B,) and M, (ids.shape, views.shape)
        codes = np.empty((B, M), f"V{self._row}")
        labels = np.empty(B, np.int64)
        if not codes.size:
            return np.empty((B, M, m.tokens), self._code_dtype), labels
        if ids.min() < 0 or ids.max() >= m.samples or views.min() < 0 or views.max() >= m.views:
            raise IndexError(f"a sample outside 0 to {m.samples - 1}, or a view outside 0 to {m.views - 1}")
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        rows = np.argsort(shards, kind="stable")  # shard by shard
        ordered = shards[rows]
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [B]])
        for group in range(0, len(cuts) - 1, self._max_open):
            ends = cuts[group : group + self._max_open + 1].tolist()
            part = rows[ends[0] : ends[-1]]
            self._gather(part, ordered, ends, ids[part], views[part], codes, labels)
        found = self._as_codes(codes.view(self._dtype).reshape(B, M, m.tokens))
        if found.max() >= m.codebook_size:
            row = int(np.argmax(found.max(axis=(1, 2))))
            raise self._invalid(ids[row], f"holds code {found[row].max()}, outside the codebook of {m.codebook_size}")
        if found.dtype.kind == "i" and found.min() < 0:
            row = int(np.argmin(found.min(axis=(1, 2))))
            raise self._invalid(ids[row], f"holds code {found[row].min()}, outside the codebook of {m.codebook_size}")
        if labels.min() < 0 or labels.max() >= len(m.classes):
            row = int(np.argmax((labels < 0) | (labels >= len(m.classes))))
            raise self._invalid(ids[row], f"has class {labels[row]}, outside 0 to {len(m.classes) - 1}")
        return found, labels

    def gather_features(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> np.ndarray:
        """ids (B,), view numbers (B, M) -> the encoder's features (B, M, P, C) float16, one call a crop.

        Raises ``UserError`` for a value that is not finite. The set must have features.
        """
        stored, ids = self.manifest.stored_features, np.asarray(ids, np.int64)
        assert stored is not None
        out = np.empty((*views.shape, stored.patches, stored.width), NUMPY)
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        for shard in np.unique(shards).tolist():
            self.open(shard)
            opened = self._maps[shard]
            assert opened.index.features is not None
            for row in np.flatnonzero(shards == shard).tolist():
                start = int(opened.index.features[ids[row] - self.starts[shard]])
                for m, view in enumerate(views[row].tolist()):
                    self._read_into(out[row, m], opened.file, start + view * stored.bytes, shard)
        if (wrong := not_finite(out)).any():
            raise self._invalid(ids[np.argmax(wrong)], "holds features that are not finite")
        return out

    def _read_into(self, part: np.ndarray, file: BinaryIO, place: int, shard: int) -> None:
        try:
            found = os.preadv(file.fileno(), [part.data], place)
        except OSError as error:
            raise self._unreadable(error) from error
        if found != part.nbytes:
            raise self._cut(self.manifest.shards[shard], os.fstat(file.fileno()).st_size)

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"token shards of {self.folder} cannot be read ({error.strerror}): check the disk")

    def _invalid(self, sample_id: int, what: str) -> UserError:
        command = f"`megastar data verify {self.folder}`"
        return UserError(f"{self.where(sample_id)} of {self.folder} {what}: find all such samples with {command}")

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
        """Read the rows (b,) of at most ``max_open`` shards: ``ordered[ends[k]:ends[k + 1]]`` are one shard's."""
        for end in ends[:-1]:
            self.open(int(ordered[end]))
        shards = ordered[ends[0] : ends[-1]]
        slots, samples = self._slots[shards], ids - self.starts[shards]
        labels[rows] = self._labels[slots, samples]
        places = self._offsets[slots, samples][:, None] + views * self._row  # (b, M)
        if sum(len(o.map) for o in self._maps.values()) > self._resident:
            for first in range(0, len(rows), _SAMPLES_AT_ONCE):
                some = slice(first, first + _SAMPLES_AT_ONCE)
                codes[rows[some]] = self._read_calls(shards[some], places[some])
            return
        for end, after in zip(ends[:-1], ends[1:], strict=True):
            span, opened = slice(end - ends[0], after - ends[0]), self._maps[int(ordered[end])]
            codes[rows[span]] = opened.windows[places[span] // opened.stride]

    def _read_calls(self, shards: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The views at ``places`` (b, M) of ``shards`` (b,), one call each -> (b, M) void, valid until the next call."""
        b, M = places.shape
        if self._buffer is None or self._buffer[0].shape[0] != b * M:
            buffer = np.empty((b * M, self._row), np.uint8)
            self._buffer = buffer, [[memoryview(row)] for row in buffer]
        buffer, parts = self._buffer
        numbers = np.repeat(shards, M).tolist()
        files = {s: self._maps[s].file.fileno() for s in set(numbers)}
        try:
            found = list(map(os.preadv, map(files.__getitem__, numbers), parts, places.ravel().tolist()))
        except OSError as error:
            raise self._unreadable(error) from error
        if found.count(self._row) != b * M:
            shard = numbers[[got == self._row for got in found].index(False)]
            raise self._cut(self.manifest.shards[shard], os.fstat(files[shard]).st_size)
        return buffer.view(f"V{self._row}").reshape(b, M)

    def _as_codes(self, codes: np.ndarray) -> np.ndarray:
        """Stored numbers -> ``code_type``."""
        wanted = self._code_dtype
        if self._dtype != wanted and codes.size:
            if codes.min() < 0 or codes.max() > np.iinfo(wanted).max:
                raise UserError(
                    f"{self.folder} holds codes from {codes.min()} to {codes.max()}, outside the vocabulary of {self.manifest.codebook_size}: pretokenize again"
                )
            codes = codes.astype(wanted)
        return codes

    def index(self, shard: int) -> ShardIndex:
        """Positions and classes of the samples of a shard. Errors as ``open``."""
        self.open(shard)
        return self._maps[shard].index

    def where(self, sample_id: int) -> str:
        """ "shard-00003.tar, sample 17": for messages."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return f"{self.manifest.shards[shard].name}, sample {sample_id - int(self.starts[shard])}"

    def sources(self, shard: int) -> list[str]:
        """Name of the source image of each sample of a shard, or the sample's key if the set records none."""
        info, m = self.manifest.shards[shard], self.manifest
        where = self.store.where(info.name)
        return find_samples(self.open(shard), where, m.layout, m.expected, info.samples, sources=True).sources

    def close(self) -> None:
        """Close the shards and stop reading ahead. Arrays that are views of a map keep it alive."""
        while self._maps:
            self._shut()
        self.store.close()

    def _shut(self) -> None:
        """Close the first of the open shards, the least recently used one."""
        shard, opened = self._maps.popitem(last=False)
        self._slots[shard] = -1
        opened.file.close()

    def open(self, shard: int) -> mmap.mmap:
        """Map shard ``shard``, verified by the store, and check its size, index and number of samples.

        Raises ``UserError`` if it changed.
        """
        if (found := self._maps.get(shard)) is not None:
            self._maps.move_to_end(shard)
            if (size := found.map.size()) != len(found.map):  # reading beyond it would be fatal
                raise self._cut(self.manifest.shards[shard], size)
            if self.store.verifier.version(found.file) == found.version:
                return found.map
            self._maps.move_to_end(shard, last=False)  # written to since it was verified
            self._shut()
        info = self.manifest.shards[shard]
        if len(self._maps) >= self._max_open:  # before the next is opened: an open shard stays in the cache
            self._shut()
        file = self.store.open(info, self.stop)
        try:
            if (size := os.fstat(file.fileno()).st_size) != info.bytes or not size:
                raise self._cut(info, size)
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            index = self._index(data, info)
            data.madvise(mmap.MADV_DONTNEED)  # the walk touched every page
        except OSError as error:
            file.close()
            raise UserError(
                f"token shard {self.store.where(info.name)} cannot be mapped ({error.strerror}): raise `ulimit -n` and `ulimit -v`, or lower data.window"
            ) from error
        except BaseException:
            file.close()
            raise
        slot = min(set(range(self._max_open)) - {o.slot for o in self._maps.values()})
        self._maps[shard] = self._register(file, data, index, slot)
        self._slots[shard] = slot
        return data

    def _cut(self, info: ShardInfo, size: int) -> UserError:
        what = f"has {size} bytes, the manifest records {info.bytes}: it was truncated or changed"
        return damaged(self.store.where(info.name), what)

    def _index(self, data: mmap.mmap, info: ShardInfo) -> ShardIndex:
        """The stored index, or else one from a walk over the tar."""
        m = self.manifest
        index = unpack_index(self.store.index(info), info, m.layout, m.expected, data)
        if index is None:
            index = walk_shard(data, self.store.where(info.name), m, info)
            self.store.keep_index(info, pack_index(index, info, m.layout, m.expected))
        return index

    def _register(self, file: BinaryIO, data: mmap.mmap, index: ShardIndex, slot: int) -> _Open:
        """Add an opened shard to the tables."""
        n = len(index.offsets)
        if n > self._offsets.shape[1]:
            more = (self._max_open, n - self._offsets.shape[1])
            self._offsets = np.concatenate([self._offsets, np.zeros(more, np.int64)], axis=1)
            self._labels = np.concatenate([self._labels, np.zeros(more, np.int64)], axis=1)
        self._offsets[slot, :n], self._labels[slot, :n] = index.offsets, index.labels
        stride = math.gcd(self._row, int(np.gcd.reduce(index.offsets)))
        positions = max(0, (len(data) - self._row) // stride + 1)
        windows = np.ndarray((positions,), f"V{self._row}", data, 0, (stride,))
        return _Open(file, self.store.verifier.version(file), data, index, windows, stride, slot)


def walk_shard(data: mmap.mmap, where: str, manifest: Manifest, info: ShardInfo) -> ShardIndex:
    """Find every sample of a shard by its headers. Raises ``UserError`` if they differ from the manifest."""
    found = find_samples(data, where, manifest.layout, manifest.expected, info.samples)
    if (n := len(found.offsets)) != info.samples:
        raise damaged(where, f"holds {n} samples, the manifest records {info.samples}: it was truncated or changed")
    return ShardIndex(found.offsets, found.labels, found.features)
