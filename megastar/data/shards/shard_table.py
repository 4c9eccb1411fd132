"""The list of shards of a large set, as a binary table beside manifest.json.

As JSON, a million shards take 200 MB, 9 s and 700 MB of memory on each rank, and a set of 10 billion images in shards of
1,000 would exceed the limit of a manifest. The table is mapped, so the ranks of a node share one copy of it, and from
s3:// it is fetched once per node. ``manifest.shards``, little-endian:

    magic 8s, version u32, bytes of a name u32, rows u64, then for each shard
    samples i64, bytes i64, SHA-256 32s, name in UTF-8, padded with zeros

manifest.json has format 2 and records the table's size and SHA-256.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
import struct
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from megastar.data.storage.shard_info import ShardInfo, is_shard_name
from megastar.data.storage.store import Store
from megastar.errors import UserError
from megastar.utils.files import sha256_of

TABLE = "manifest.shards"
TABLE_ABOVE = 100_000  # shards: up to this number, manifest.json lists them itself
_MAGIC, _VERSION = b"MSTARTAB", 1
_HEAD = struct.Struct("<8sIIQ")
_MAX_BYTES, _MAX_NAME = 2**36, 250
_AT_ONCE = 1 << 16  # rows


class ShardTable(Sequence[ShardInfo]):
    """The rows of a table in ``data``, made into ``ShardInfo`` when they are used."""

    def __init__(self, data: bytes | mmap.mmap):
        if len(data) < _HEAD.size:
            raise ValueError(f"it has {len(data)} bytes")
        magic, version, width, rows = _HEAD.unpack_from(data)
        if magic != _MAGIC or version != _VERSION or not 1 <= width <= _MAX_NAME:
            raise ValueError("it is not a table of shards of version 1")
        kind = np.dtype([("samples", "<i8"), ("bytes", "<i8"), ("sha256", "V32"), ("name", f"S{width}")])
        if len(data) != _HEAD.size + rows * kind.itemsize:
            raise ValueError(f"it has {len(data)} bytes, not those of {rows} rows")
        self.rows: np.ndarray = np.frombuffer(data, kind, rows, _HEAD.size)  # (shards,)
        self.samples: np.ndarray = np.ascontiguousarray(self.rows["samples"])  # (shards,) int64

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardInfo]: ...
    def __getitem__(self, index: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        samples, size, sha256, raw = self.rows[index].item()
        if not is_shard_name(name := raw.decode(errors="replace")):
            raise UserError(f"{TABLE} names a shard {name[:200]!r}: it must be the plain name of a .tar beside it")
        return ShardInfo(name, samples, size, sha256.hex())


def pack_table(shards: Sequence[ShardInfo]) -> bytes:
    """The content of ``manifest.shards``."""
    names = [s.name.encode() for s in shards]
    width = max(map(len, names))
    row = struct.Struct(f"<qq32s{width}s")
    rows = (row.pack(s.samples, s.bytes, bytes.fromhex(s.sha256), n) for s, n in zip(shards, names, strict=True))
    return _HEAD.pack(_MAGIC, _VERSION, width, len(names)) + b"".join(rows)


def describe_table(data: bytes) -> dict[str, Any]:
    """The entry ``table`` of manifest.json."""
    return {"name": TABLE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_table(store: Store, entry: dict[str, Any]) -> ShardTable:
    """The table that manifest.json records in ``entry``. Raises ``UserError`` if it is missing, changed or damaged."""
    size, sha256, where = entry["bytes"], entry["sha256"], store.where(TABLE)
    if entry["name"] != TABLE or type(size) is not int or not 1 <= size <= _MAX_BYTES:
        raise ValueError(f"the entry `table` is {entry!r:.200}")
    with store.open(ShardInfo(TABLE, 0, size, sha256)) as file:
        if (found := sha256_of(file)) != sha256:
            raise UserError(f"{where} has SHA-256 {found}, manifest.json records {sha256!r:.80}: copy both again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return ShardTable(data)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): copy it again") from error


def largest(shards: Sequence[ShardInfo], count: int) -> list[ShardInfo]:
    """The ``count`` shards with the most bytes."""
    if isinstance(shards, ShardTable):
        return [shards[int(i)] for i in np.argsort(-shards.rows["bytes"], kind="stable")[:count]]
    return heapq.nlargest(count, shards, key=lambda s: s.bytes)


def update_digest(digest: hashlib._Hash, shards: Sequence[ShardInfo]) -> None:
    """Add the shards' SHA-256s in hexadecimal."""
    for first in range(0, len(shards), _AT_ONCE):
        if isinstance(shards, ShardTable):
            digest.update(shards.rows["sha256"][first : first + _AT_ONCE].tobytes().hex().encode())
        else:
            digest.update("".join(s.sha256 for s in shards[first : first + _AT_ONCE]).encode())


def digest_of(shards: Sequence[ShardInfo]) -> str:
    """SHA-256 over those of the shards: a run resumes only on the samples that it was trained on."""
    update_digest(digest := hashlib.sha256(), shards)
    return digest.hexdigest()
