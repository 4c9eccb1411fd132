"""Reading token shards by position. A tar that was cut, even at a member boundary, where tar readers see a clean end,
no longer agrees with the manifest.
"""

from __future__ import annotations

import io
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
from megastar.data.manifest import Manifest, ShardInfo, parse_manifest
from megastar.data.store import is_remote, open_store
from megastar.errors import UserError

_BLOCK = 512  # tar's unit


@dataclass(frozen=True)
class _Index:
    """Where each sample of a shard lies."""

    offsets: np.ndarray  # (n,) int64, of the first code
    labels: np.ndarray  # (n,) int64


class ShardSet:
    """Random access to the samples of a folder of shards, or of ``s3://bucket/prefix`` (``data``: cache and patience).

    A sample's id is its place in the manifest's order: shard by shard, tar order within. A shard is indexed when it is
    first touched. At most ``max_open`` are mapped at once. The event ``stop`` ends a wait for a shard with ``Stopped``.
    """

    def __init__(self, folder: str | Path, *, data: DataConfig | None = None, max_open: int = 64):
        self.folder = folder if is_remote(folder) else Path(folder)
        self.store = open_store(folder, data)
        self.manifest = parse_manifest(self.store)
        self.stop = threading.Event()
        self.starts = np.concatenate([[0], np.cumsum(self.manifest.shard_sizes)]).astype(np.int64)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._indexes: dict[int, _Index] = {}
        self._max_open = max_open

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, shard: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Sample ``sample`` of shard ``shard`` -> codes (views, T) uint16 (a view of the file), class, id."""
        data = self.open(shard)
        index = self._indexes[shard]
        m = self.manifest
        codes = np.frombuffer(data, "<u2", m.views * m.tokens, int(index.offsets[sample])).reshape(m.views, m.tokens)
        return codes, int(index.labels[sample]), int(self.starts[shard]) + sample

    def gather(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids (B,), view numbers (B, M) -> codes (B, M, T) uint16, classes (B,) int64."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        codes = np.empty((*views.shape, self.manifest.tokens), np.uint16)
        labels = np.empty(len(ids), np.int64)
        for row, (i, shard) in enumerate(zip(ids, shards, strict=True)):
            stored, labels[row], _ = self.read(int(shard), int(i - self.starts[shard]))
            codes[row] = stored[views[row]]
        return codes, labels

    def where(self, sample_id: int) -> str:
        """ "shard-00003.tar, sample 17": for messages."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return f"{self.manifest.shards[shard].name}, sample {sample_id - int(self.starts[shard])}"

    def close(self) -> None:
        """Drop the memory maps; arrays that still look into one keep it alive. Ends the reading ahead."""
        self._maps.clear()
        self.store.close()

    def open(self, shard: int) -> mmap.mmap:
        """Map shard ``shard``, the first time index and check it. Raises ``UserError`` for a cut or changed file."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        info = self.manifest.shards[shard]
        path = self.store.where(info.name)
        while len(self._maps) >= self._max_open:  # before the next one: a map keeps its shard in the cache
            self._maps.popitem(last=False)
        with self.store.open(info, self.stop) as f:
            if (size := os.fstat(f.fileno()).st_size) != info.bytes:
                raise UserError(
                    f"token shard {path} has {size} bytes, the manifest says {info.bytes}: it was cut or changed, copy it again or pretokenize again"
                )
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if shard not in self._indexes:
            self._indexes[shard] = self._walk(data, path, info)
        self._maps[shard] = data
        return data

    def _walk(self, data: mmap.mmap, path: str, info: ShardInfo) -> _Index:
        """Find every sample by walking the headers, and check them: a tar's own end mark proves nothing."""
        m = self.manifest
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<u2", "fortran_order": False, "shape": (m.views, m.tokens)}
        )
        npy, wanted = header.getvalue(), m.views * m.tokens * 2
        offsets: dict[str, int] = {}
        labels: dict[str, int] = {}
        position, end = 0, len(data)
        while position + _BLOCK <= end:
            block = data[position : position + _BLOCK]
            if block[0] == 0:  # the end mark
                break
            name, size = _parse_header(block, path, position)
            start = position + _BLOCK
            if start + size > end:
                raise UserError(
                    f"token shard {path} ends inside {name}: it was cut, copy it again or pretokenize again"
                )
            key, _, extension = name.partition(".")
            if extension == "codes.npy":
                if data[start : start + len(npy)] != npy or size != len(npy) + wanted:
                    raise UserError(
                        f"token shard {path}: {name} is not {m.views} views of {m.tokens} codes as the manifest says: pretokenize again"
                    )
                offsets[key] = start + len(npy)
            elif extension == "cls":
                labels[key] = int(data[start : start + size])
            position = start + -(-size // _BLOCK) * _BLOCK
        if len(offsets) != info.samples or offsets.keys() != labels.keys():
            raise UserError(
                f"token shard {path} holds {len(offsets)} samples, the manifest says {info.samples}: it was cut or changed, copy it again or pretokenize again"
            )
        return _Index(np.fromiter(offsets.values(), np.int64), np.fromiter((labels[k] for k in offsets), np.int64))


def _parse_header(block: bytes, path: str, position: int) -> tuple[str, int]:
    """A tar header -> member name and size. The check sum tells a header from data."""
    try:
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if total != int(block[148:156].strip(b" \0"), 8):
            raise ValueError("check sum")
        return block[:100].rstrip(b"\0").decode(), int(block[124:136].strip(b" \0"), 8)
    except ValueError as error:
        raise UserError(
            f"token shard {path} has a broken header at byte {position}: copy it again or pretokenize again"
        ) from error


def verify(folder: str | Path) -> Manifest:
    """Read every shard and compare its SHA-256 with the manifest. Raises ``UserError`` naming the first that differs."""
    shards = ShardSet(folder)
    for number, info in enumerate(shards.manifest.shards):
        shards.open(number)
        with shards.store.open(info) as f:
            found = sha256_of(f)
        if found != info.sha256:
            raise UserError(
                f"token shard {shards.store.where(info.name)} has SHA-256 {found}, the manifest says {info.sha256}: copy it again or pretokenize again"
            )
    return shards.manifest
