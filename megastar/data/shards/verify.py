"""Whether a set of token shards is what its manifest says: every byte is read, every broken shard is named."""

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
from megastar.data.shards.index import ShardIndex, unpack_index
from megastar.data.shards.manifest import Manifest, parse_manifest
from megastar.data.shards.progress_bar import bar_of
from megastar.data.shards.reader import walk_shard
from megastar.data.shards.sample_parser import DTYPES
from megastar.data.storage.errors import OutOfReach
from megastar.data.storage.protocol import Store
from megastar.data.storage.shard_info import ShardInfo, index_name
from megastar.data.storage.store import open_store
from megastar.errors import UserError

_AT_ONCE = 4 << 20  # bytes of codes that are compared at once
_THREADS = 2  # shards at once: one is hashed while the other's codes are looked at


class ShardProblem(NamedTuple):
    """What is wrong with a shard."""

    shard: str  # its name
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


def verify(folder: str | Path, data: DataConfig | None = None, progress: Console | None = None) -> list[ShardProblem]:
    """Read every shard of a folder or ``s3://bucket/prefix`` (there, not in the cache) and compare it with the manifest.

    Compared are size, SHA-256, count and shape of the samples, codes with the code book, classes with their names, and
    the index beside the shard with the tar, where a reader would use it.
    Returns what is wrong, in the shards' order: nothing for a good set. ``progress`` shows a bar. Raises ``UserError``
    for a manifest that cannot be had or is none, and when the store is out of reach.
    """
    with closing(open_store(folder, data)) as store:
        manifest = parse_manifest(store)
        with ThreadPoolExecutor(_THREADS) as pool, bar_of("verify", manifest.shards, progress) as step:
            found: list[ShardProblem] = []
            checks = [pool.submit(_check, store, manifest, info) for info in manifest.shards]
            try:
                for info, check in zip(manifest.shards, checks, strict=True):
                    found += check.result()
                    step(info)
            finally:
                for check in checks:
                    check.cancel()
    return found


def _check(store: Store, manifest: Manifest, info: ShardInfo) -> list[ShardProblem]:
    try:
        f, found = store.audit(info)
    except OutOfReach:  # which says nothing about this shard, nor about the next one
        raise
    except UserError as error:
        return [ShardProblem(info.name, str(error))]
    except OSError as error:  # a disk that fails
        return [ShardProblem(info.name, f"cannot be read ({error.strerror}): mend the disk or copy it again")]
    with f:
        return [ShardProblem(info.name, reason) for reason in _reasons(f.fileno(), found, store, manifest, info)]


def _reasons(fd: int, found: str, store: Store, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    size = os.fstat(fd).st_size
    if size != info.bytes:
        yield f"has {size} bytes, the manifest says {info.bytes}: it was cut or changed"
        return
    if not size:
        yield "is empty, not even tar's end mark is there: it was cut or changed"
        return
    if found != info.sha256:  # what else is wrong tells where to look
        yield f"has SHA-256 {found}, the manifest says {info.sha256}: it was changed"
    with closing(mmap.mmap(fd, 0, access=mmap.ACCESS_READ)) as data:
        try:
            index = walk_shard(data, store.where(info.name), manifest, info)
        except UserError as error:
            yield str(error)
            return
        kept = unpack_index(store.audit_index(info), info, manifest.layout, manifest.expected, data)
        same = kept is None or all(
            np.array_equal(a, b) for a, b in ((kept.offsets, index.offsets), (kept.labels, index.labels))
        )
        if not same:
            yield f"its index {index_name(info.name)} tells of other samples: remove that file, it is made again"
        yield from _contents(data, index, manifest)


def _contents(data: mmap.mmap, index: ShardIndex, manifest: Manifest) -> Iterator[str]:
    """Codes outside the code book, classes without a name."""
    outside = (index.labels < 0) | (index.labels >= len(manifest.classes))
    if outside.any():
        row = int(np.argmax(outside))
        yield f"sample {row} has class {index.labels[row]}, outside 0 to {len(manifest.classes) - 1} ({outside.sum()} such samples)"
    dtype, size = np.dtype(DTYPES[manifest.dtype]), manifest.expected.bytes
    bad, first = 0, ""
    step = max(1, _AT_ONCE // size)
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
        yield f"{first}, outside the code book of {manifest.codebook_size} ({bad} such samples)"
