"""Compare a set of token shards with its manifest: every byte is read, every broken shard is named."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from megastar.config.schema import DataConfig
from megastar.data.shards.features import NUMPY, not_finite
from megastar.data.shards.index import ShardIndex, unpack_index
from megastar.data.shards.manifest import Manifest, parse_manifest
from megastar.data.shards.reader import walk_shard
from megastar.data.shards.sample_parser import DTYPES
from megastar.data.storage.errors import StoreUnreachable
from megastar.data.storage.shard_info import ShardInfo, index_name
from megastar.data.storage.store import Store, open_store
from megastar.errors import UserError
from megastar.utils.progress_bar import progress_bar

_BYTES_AT_ONCE = 4 << 20  # of codes
_THREADS = 2  # one shard is hashed while the codes of another are checked


class ShardProblem(NamedTuple):
    shard: str  # its name
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


def verify(folder: str | Path, data: DataConfig | None = None, progress: Console | None = None) -> list[ShardProblem]:
    """Read every shard of a folder or ``s3://bucket/prefix``, bypassing the cache, and compare it with the manifest.

    Checked are size, SHA-256, number and shape of the samples, the range of codes and classes, that features are finite, and the index beside the
    shard if a reader would use it. Returns the problems in the shards' order, none for a good set. ``progress`` shows a
    bar. Raises ``UserError`` for an invalid manifest and an unreachable store.
    """
    with closing(open_store(folder, data)) as store:
        manifest = parse_manifest(store)
        total = sum(s.bytes for s in manifest.shards)
        bar = progress_bar(progress, "verify", total, bytes=True, transient=True)
        with ThreadPoolExecutor(_THREADS) as pool, bar as done:
            found: list[ShardProblem] = []
            checks = [pool.submit(_check, store, manifest, info) for info in manifest.shards]
            try:
                for info, check in zip(manifest.shards, checks, strict=True):
                    found += check.result()
                    done.advance(info.bytes)
            finally:
                for check in checks:
                    check.cancel()
    return found


def _check(store: Store, manifest: Manifest, info: ShardInfo) -> list[ShardProblem]:
    try:
        f, found = store.open_uncached(info.name)
    except StoreUnreachable:  # not a problem of this shard
        raise
    except UserError as error:
        return [ShardProblem(info.name, str(error))]
    except OSError as error:  # a failing disk
        return [ShardProblem(info.name, f"cannot be read ({error.strerror}): check the disk or copy it again")]
    with f:
        return [ShardProblem(info.name, reason) for reason in _reasons(f.fileno(), found, store, manifest, info)]


def _reasons(fd: int, found: str, store: Store, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    size = os.fstat(fd).st_size
    if size != info.bytes:
        yield f"has {size} bytes, the manifest records {info.bytes}: it was truncated or changed"
        return
    if not size:
        yield "is empty: it was truncated or changed"
        return
    if found != info.sha256:  # go on: the other problems tell where to look
        yield f"has SHA-256 {found}, the manifest records {info.sha256}: it was changed"
    with closing(mmap.mmap(fd, 0, access=mmap.ACCESS_READ)) as data:
        try:
            index = walk_shard(data, store.where(info.name), manifest, info)
        except UserError as error:
            yield str(error)
            return
        kept = unpack_index(store.index_uncached(info), info, manifest.layout, manifest.expected, data)
        if kept and not all(_equal(getattr(kept, k), getattr(index, k)) for k in ("offsets", "labels", "features")):
            yield f"its index {index_name(info.name)} does not match its samples: remove it, and it is rebuilt"
        yield from _contents(data, index, manifest)


def _contents(data: mmap.mmap, index: ShardIndex, manifest: Manifest) -> Iterator[str]:
    """Codes and classes out of range."""
    outside = (index.labels < 0) | (index.labels >= len(manifest.classes))
    if outside.any():
        row = int(np.argmax(outside))
        yield f"sample {row} has class {index.labels[row]}, outside 0 to {len(manifest.classes) - 1} ({outside.sum()} such samples)"
    dtype, size = np.dtype(DTYPES[manifest.dtype]), manifest.expected.bytes
    bad, first = 0, ""
    step = max(1, _BYTES_AT_ONCE // size)
    for start in range(0, len(index.offsets), step):
        offsets = index.offsets[start : start + step]
        read = b"".join(data[o : o + size] for o in offsets.tolist())
        codes = np.frombuffer(read, dtype).reshape(len(offsets), -1)  # (n, views * T)
        if codes.max() >= manifest.codebook_size or codes.min() < 0:
            wrong = (codes >= manifest.codebook_size) | (codes < 0)
            rows = wrong.any(axis=1)
            row = int(np.argmax(rows))
            first = first or f"sample {start + row} has code {codes[row][np.argmax(wrong[row])]}"
            bad += int(rows.sum())
        data.madvise(mmap.MADV_DONTNEED)
    if bad:
        yield f"{first}, outside the codebook of {manifest.codebook_size} ({bad} such samples)"
    yield from _features(data, index, manifest)


def _features(data: mmap.mmap, index: ShardIndex, manifest: Manifest) -> Iterator[str]:
    """Features that are not finite."""
    stored, bad, first = manifest.stored_features, 0, -1
    if stored is None or index.features is None:
        return
    size = manifest.views * stored.bytes
    for row, start in enumerate(index.features.tolist()):
        if not_finite(np.frombuffer(data, NUMPY, size // NUMPY.itemsize, start)[None])[0]:
            first, bad = row if first < 0 else first, bad + 1
        if row % max(1, _BYTES_AT_ONCE // size) == 0:
            data.madvise(mmap.MADV_DONTNEED)
    if bad:
        yield f"sample {first} holds features that are not finite ({bad} such samples)"


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
