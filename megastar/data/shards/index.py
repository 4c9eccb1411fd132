"""The binary index beside a shard: the position of each sample, so that opening a shard needs no walk over its headers.

``shard-00000.idx`` of ``shard-00000.tar``, little-endian:

    magic 8s, version u32, layout u32, samples u64, bytes of the tar u64, SHA-256 of the tar 32s,
    dtype of the codes 8s, views u32, tokens u32, offsets (n,) i64, classes (n,) i64, SHA-256 of everything before 32s

Of a set with features it is version 2: behind the classes follow the positions of the features, (n,) i64.

An index that is missing, broken or of another tar is rebuilt from the tar.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from megastar.data.shards.sample_parser import LAYOUTS, Expected
from megastar.data.shards.tar_reader import BLOCK, Buffer
from megastar.data.storage.shard_info import ShardInfo

_MAGIC, _VERSION, _WITH_FEATURES = b"MSTARIDX", 1, 2
_HEAD = struct.Struct("<8sIIQQ32s8sII")
_DIGEST = 32
_PROBES = 8  # arrays whose headers are checked when a shard is opened


@dataclass(frozen=True)
class ShardIndex:
    """Position and class of each of a shard's n samples."""

    offsets: np.ndarray  # (n,) int64, of the first code, in bytes from the start of the tar
    labels: np.ndarray  # (n,) int64
    features: np.ndarray | None = None  # (n,) int64, of the first feature; None: the set has none


def pack_index(index: ShardIndex, info: ShardInfo, layout: str, expected: Expected) -> bytes:
    """The content of the index file of the tar that ``info`` describes."""
    body = _head(info, layout, expected)
    body += index.offsets.astype("<i8").tobytes() + index.labels.astype("<i8").tobytes()
    if expected.features is not None:
        assert index.features is not None
        body += index.features.astype("<i8").tobytes()
    return body + hashlib.sha256(body).digest()


def unpack_index(
    data: bytes | None, info: ShardInfo, layout: str, expected: Expected, tar: Buffer
) -> ShardIndex | None:
    """The index in ``data``; None, so that it must be rebuilt, unless it is complete and matches the tar."""
    numbers = _columns(data, info, layout, expected)
    if numbers is None:
        return None
    index, n = ShardIndex(*numbers), info.samples
    if n and (index.offsets.min() < 0 or index.offsets.max() > len(tar) - expected.bytes):
        return None
    if n and index.features is not None and expected.features is not None:
        size = expected.views * expected.features.bytes
        if index.features.min() < 0 or index.features.max() > len(tar) - size:
            return None
        if not _fits(ShardIndex(index.features, index.labels), layout, size, tar):
            return None
    return index if _fits(index, layout, expected.bytes, tar) else None


def stored_labels(data: bytes | None, info: ShardInfo, layout: str, expected: Expected) -> np.ndarray | None:
    """The classes (n,) in an index, without its tar; None unless it is complete and names the tar's hash."""
    numbers = _columns(data, info, layout, expected)
    return None if numbers is None else numbers[1]


def _columns(data: bytes | None, info: ShardInfo, layout: str, expected: Expected) -> np.ndarray | None:
    """The columns (2 or 3, n) of an index; None unless it is complete and names the tar's hash."""
    columns, n = 2 if expected.features is None else 3, info.samples
    if data is None or len(data) != _HEAD.size + 8 * columns * n + _DIGEST:
        return None
    body = data[:-_DIGEST]
    if not body.startswith(_head(info, layout, expected)) or hashlib.sha256(body).digest() != data[-_DIGEST:]:
        return None
    return np.frombuffer(body, "<i8", columns * n, _HEAD.size).astype(np.int64).reshape(columns, n)


def _head(info: ShardInfo, layout: str, expected: Expected) -> bytes:
    shape = (expected.views, expected.tokens) if info.samples else (0, 0)  # an empty shard has no shape
    digest, dtype = bytes.fromhex(info.sha256), expected.dtype.encode()
    version = _VERSION if expected.features is None else _WITH_FEATURES
    return _HEAD.pack(_MAGIC, version, LAYOUTS.index(layout), info.samples, info.bytes, digest, dtype, *shape)


def _fits(index: ShardIndex, layout: str, sample: int, tar: Buffer) -> bool:
    """Check some array headers: a tar replaced by another of the same size may have its arrays elsewhere."""
    firsts = index.offsets
    if layout == "packed":  # only the first sample of a block follows a header
        firsts = firsts[np.diff(firsts, prepend=-1 - sample) != sample]
    places = np.linspace(0, len(firsts) - 1, min(_PROBES, len(firsts))).astype(np.int64)
    for offset in firsts[places]:
        start = (int(offset) - 1) // BLOCK * BLOCK  # an npy header has 64 to 512 bytes
        if start < BLOCK or tar[start : start + 6] != b"\x93NUMPY":
            return False
    return True
