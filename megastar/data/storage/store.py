"""Stores of token shards: a folder, or s3://bucket/prefix read through a cache on the node.

A shard on S3 is fetched whole and mapped from the cache, so that training reads the same bytes as from a folder. Every
shard is compared with its SHA-256 before it is read (verification.py). The shards that come next are fetched and
verified in the background; a run waits for S3 only when that falls behind, and logs the wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from megastar.config.schema import DataConfig
from megastar.data.storage.s3_store import S3Store
from megastar.data.storage.shard_info import MANIFEST, MAX_MANIFEST_BYTES, ShardInfo, index_name, max_index_bytes
from megastar.data.storage.shard_queue import ShardQueue
from megastar.data.storage.stall_timer import NEVER
from megastar.data.storage.verification import BeingVerified, Verifier
from megastar.errors import UserError
from megastar.utils.files import read_small, sha256_of, write_atomic

_HASHERS = 2  # threads that verify ahead, one shard each


class FolderStore:
    """A folder of this machine; nothing is copied. ``S3Store`` has the same methods."""

    remote = False  # whether shards are read through the cache
    last_message = ""  # the last message about a wait; empty if there was none
    degraded = ""  # why reading is slow at present; empty if it is not

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.verifier = Verifier(ctime=True)
        self._queue = ShardQueue(self._verify_ahead, _HASHERS, first_alone=False)

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return str(self.folder / name)

    def manifest(self) -> bytes:
        """Content of manifest.json. Raises ``UserError`` if it cannot be read."""
        if not self.folder.is_dir():
            raise UserError(f"token shards folder {self.folder} does not exist: make it with `megastar pretokenize`")
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{self.folder} has no {MANIFEST}: pretokenize has not finished there, run the same command again"
            )
        if (data := read_small(path, MAX_MANIFEST_BYTES)) is None:
            raise UserError(f"{path} cannot be read or is larger than {MAX_MANIFEST_BYTES >> 20} MiB: copy it again")
        return data

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        """A shard as a local file, which is kept while the file or a map of it exists.

        Its SHA-256 is that of the manifest: it is hashed here unless that was done by a process of this node that still
        runs. ``stop`` cancels a wait with ``Stopped``. Raises ``UserError`` for a shard that is missing, changed or
        unreachable.
        """
        f = self._open(info.name)
        try:
            if os.fstat(f.fileno()).st_size == info.bytes:  # the reader compares the size too
                self._verify(f, info, stop)
            return f
        except BaseException:
            f.close()
            raise

    def _verify(self, f: BinaryIO, info: ShardInfo, stop: threading.Event, wait: bool = True) -> None:
        path = self.folder / info.name
        try:
            found = self.verifier.digest(f, info, stop, wait)
        except OSError as error:
            raise UserError(
                f"token shard {path} cannot be read ({error.strerror}): check the disk, or copy it again"
            ) from error
        if found != info.sha256:
            raise UserError(
                f"token shard {path} has SHA-256 {found}, the manifest records {info.sha256}: it is damaged or was changed; copy it again, and find all such shards with `megastar data verify {self.folder}`"
            )

    def _open(self, name: str) -> BinaryIO:
        path = self.folder / name
        if not path.is_file():
            raise UserError(
                f"token shard {path} is missing though the manifest lists it: copy it again or pretokenize again"
            )
        try:
            return path.open("rb")
        except OSError as error:  # no permission, or too many open files
            raise UserError(
                f"token shard {path} cannot be opened ({error.strerror}): make it readable, raise `ulimit -n`, or lower data.window"
            ) from error

    def index(self, info: ShardInfo) -> bytes | None:
        """The stored index of a shard, None without one. Unchecked: compare it with the shard."""
        path = self._index(info)
        with suppress(OSError):
            if path.stat().st_mtime_ns >= (self.folder / info.name).stat().st_mtime_ns:  # else of an earlier tar
                return read_small(path, max_index_bytes(info))
        return None

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        """Store the index of a shard for later readers, where that is possible."""
        if self.index(info) == data:  # another rank has walked the same tar
            return
        with suppress(OSError, UserError):  # no permission to write, or a folder or a pipe of that name
            write_atomic(self._index(info), data)

    def open_uncached(self, name: str) -> tuple[BinaryIO, str]:
        """A shard as it is in the store now, whatever its size, and its SHA-256. Errors as ``open``."""
        f = self._open(name)
        return f, sha256_of(f)

    def index_uncached(self, info: ShardInfo) -> bytes | None:
        """As ``index``, bypassing the cache."""
        return self.index(info)

    def _index(self, info: ShardInfo) -> Path:
        return self.folder / index_name(info.name)

    def names(self) -> list[str]:
        """Names of all files of the store. Raises ``UserError`` for a store that does not exist."""
        if not self.folder.is_dir():
            raise UserError(f"token shards folder {self.folder} does not exist: name the folder that holds the tars")
        return [p.name for p in self.folder.iterdir() if p.is_file()]

    def put(self, name: str, data: bytes) -> None:
        """Write a small file. Raises ``UserError`` where that is not possible."""
        try:
            write_atomic(self.folder / name, data)
        except OSError as error:
            raise UserError(f"cannot write {self.where(name)} ({error.strerror}): make the folder writable") from error

    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        """Fetch and verify these shards next, in this order, in the background. Replaces the previous list."""
        self._queue.replace(dict.fromkeys(shards))

    def _verify_ahead(self, info: ShardInfo, closed: threading.Event) -> bool:
        try:
            with self._open(info.name) as f:
                self._verify(f, info, closed, wait=False)
        except BeingVerified:
            return False
        return True

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        """Raise ``UserError`` unless the cache can hold all of these at once."""

    def close(self) -> None:
        """Stop the background threads. The store can be used again."""
        self._queue.close()


Store = FolderStore | S3Store


def is_remote(url: str | Path) -> bool:
    return str(url)[:5].lower() == "s3://"


def open_store(url: str | Path, data: DataConfig | None = None) -> Store:
    """The store of a folder or ``s3://bucket/prefix``; ``data`` configures cache and patience (None: the defaults)."""
    return S3Store(str(url), data or DataConfig()) if is_remote(url) else FolderStore(url)
