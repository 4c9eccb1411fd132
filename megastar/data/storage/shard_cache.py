"""A cache of remote shards on this node, shared by all processes of the node.

Shards are stored under their SHA-256, so that runs share them and a changed shard is never mistaken for another. The
protocol consists of kernel locks (flock), which end with the process that holds them, however it ends:

    SHA.tar    complete: checked and synced before the rename. Readers hold a shared lock, removal needs an exclusive one
    SHA.idx    the index of that shard: optional, unchecked, removed with the shard
    SHA.part   being fetched by the process that holds its exclusive lock; without a lock it is left over
    lock       held while space is freed

Only regular files of this user are opened. A folder that others may write to is not used itself, but a folder of this
user in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megastar.data.storage.errors import CacheFull
from megastar.data.storage.shard_info import ShardInfo, max_index_bytes
from megastar.errors import UserError
from megastar.utils.files import read_at_most, sync_folder, write_atomic
from megastar.utils.own_files import open_own, own_folder

_SUFFIX = ".idx"  # of an index
_INDEX_SECONDS = 60.0  # after that a temporary file of an index is left over


class ShardCache:
    """``folder`` (empty: a per-user directory under $TMPDIR) with at most ``max_bytes``, not counting shards in use.

    Raises ``UserError`` for a folder that cannot be used.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        self.max_bytes = max_bytes
        try:
            self.folder = own_folder(folder)
            with self._locked():
                self._sweep()
        except (OSError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) or error.errno else f"{error.filename} {error.strerror}"
            raise UserError(
                f"data.cache = {folder or 'the default'} cannot be used ({reason}): set it to a folder on a disk of this node"
            ) from error

    def open(self, info: ShardInfo) -> BinaryIO | None:
        """The shard, protected from removal while this file or a map of it exists; None if it is not cached."""
        path = self._path(info)
        while True:
            try:
                f = open_own(path)
            except PermissionError:  # a link, or another user's file: it must neither be used nor block the name
                self._clear(path, info)
                return None
            except OSError:  # missing, or the disk has failed
                return None
            fcntl.flock(f, fcntl.LOCK_SH)
            if _is_at(f, path):
                break
            f.close()  # removed while we waited for the lock
        if os.fstat(f.fileno()).st_size != info.bytes:
            if _is_at(f, path):  # truncated: fetch it again, even if another process still reads it
                path.unlink(missing_ok=True)
            f.close()
            return None
        self._used(f)
        return f

    def remove(self, f: BinaryIO, info: ShardInfo) -> Path:
        """Remove a damaged shard, which was opened by ``open``, even if another process reads it; returns its path."""
        path = self._path(info)
        with self._disk_errors(info), f:
            if _is_at(f, path):
                path.unlink(missing_ok=True)
                path.with_suffix(_SUFFIX).unlink(missing_ok=True)
        return path

    def _used(self, f: BinaryIO) -> None:
        """Record the time of use, which decides what is removed. The modification time identifies a verified file."""
        with suppress(OSError):
            os.utime(f.fileno(), ns=(time.time_ns(), os.fstat(f.fileno()).st_mtime_ns))

    def _clear(self, path: Path, info: ShardInfo) -> None:
        with self._disk_errors(info):
            path.unlink(missing_ok=True)

    def claim(self, info: ShardInfo) -> BinaryIO | None:
        """The temporary file of a shard, for the one process that fetches it; None if another process has it."""
        part = self._part(info)
        while True:
            try:
                f = open_own(part, os.O_RDWR | os.O_CREAT)
            except PermissionError:
                self._clear(part, info)
                continue
            except OSError as error:
                raise self._full(info, error) from error
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.close()
                return None
            if not _is_at(f, part):  # committed or removed between the two calls
                f.close()
                continue
            if self._path(info).exists():
                self.discard(f, info)
                return None
            os.ftruncate(f.fileno(), 0)
            return f

    def reserve(self, part: BinaryIO, info: ShardInfo, required: bool) -> bool:
        """Free space for a claimed shard: least recently used first, never what is in use.

        If the shards in use leave too little, returns False, or exceeds ``max_bytes`` with ``required``. If the disk is
        full for other reasons, everything not in use may go. Raises ``CacheFull`` if that is not enough.
        """
        with self._disk_errors(info), self._locked():
            held = []
            for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
                with suppress(FileNotFoundError):
                    stat, index = path.stat(), path.with_suffix(_SUFFIX)
                    size = stat.st_size + (index.stat().st_size if index.exists() else 0)
                    held.append((stat.st_atime_ns, size, path))
            used = info.bytes + sum(size for _, size, _ in held)
            oldest = deque((size, path) for _, size, path in sorted(held) if path.suffix == ".tar")

            def remove_one() -> int:
                size, path = oldest.popleft()
                if not _remove(path):
                    return 0
                path.with_suffix(_SUFFIX).unlink(missing_ok=True)
                return size

            while used > self.max_bytes and oldest:
                used -= remove_one()
            if used > self.max_bytes and not required:
                return False
            while True:
                try:
                    os.posix_fallocate(part.fileno(), 0, max(1, info.bytes))
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (required and oldest):
                        raise
                    remove_one()

    def commit(self, part: BinaryIO, info: ShardInfo) -> BinaryIO:
        """Rename a complete and checked shard into place. Returns it as ``open`` does."""
        with self._disk_errors(info):
            os.fsync(part.fileno())
            self._part(info).rename(self._path(info))
            sync_folder(self.folder)
        fcntl.flock(part, fcntl.LOCK_SH)
        self._used(part)
        return part

    def discard(self, part: BinaryIO, info: ShardInfo) -> None:
        """Give up a claim."""
        with suppress(OSError):
            if _is_at(part, self._part(info)):
                self._part(info).unlink()
        part.close()

    def activity(self, info: ShardInfo) -> int:
        """A number that changes while another process fetches the shard."""
        with suppress(FileNotFoundError):
            return self._part(info).stat().st_mtime_ns
        return 0

    def index(self, info: ShardInfo) -> bytes | None:
        """The index stored by ``keep_index``, unchecked."""
        with suppress(OSError), open_own(self._path(info).with_suffix(_SUFFIX)) as f:
            return read_at_most(f, max_index_bytes(info))
        return None

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        """Store the index of a cached shard; does nothing where that is not possible."""
        path = self._path(info).with_suffix(_SUFFIX)
        if self._path(info).exists() and not path.is_symlink():
            with suppress(OSError, UserError):
                write_atomic(path, data)

    @contextmanager
    def _disk_errors(self, info: ShardInfo) -> Iterator[None]:
        """Raise ``CacheFull`` for an ``OSError`` in the block."""
        try:
            yield
        except OSError as error:
            raise self._full(info, error) from error

    def _full(self, info: ShardInfo, error: OSError) -> CacheFull:
        return CacheFull(
            f"{info.name} ({info.bytes} bytes) cannot be written to the cache {self.folder} ({error.strerror}): free some space there, or set another data.cache"
        )

    def _path(self, info: ShardInfo) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", info.sha256):  # it names a file and comes from a remote manifest
            raise UserError(
                f"the manifest records the SHA-256 {info.sha256!r} for {info.name}, not 64 hexadecimal digits: pretokenize again"
            )
        return self.folder / f"{info.sha256}.tar"

    def _part(self, info: ShardInfo) -> Path:
        return self._path(info).with_suffix(".part")

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        for part in self.folder.glob("*.part"):
            _remove(part)
        for index in self.folder.glob(f"*{_SUFFIX}"):
            if not index.with_suffix(".tar").exists():
                index.unlink(missing_ok=True)
        for temporary in self.folder.glob("*.tmp"):  # of an index
            with suppress(FileNotFoundError):
                if time.time() - temporary.stat().st_mtime > _INDEX_SECONDS:
                    temporary.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open_own(self.folder / "lock", os.O_RDWR | os.O_CREAT) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


def _is_at(f: BinaryIO, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file that is not in use; whether it was removed."""
    try:
        with open_own(path) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(f, path):
                return False
            path.unlink()
            return True
    except OSError:  # in use, missing, or another user's
        return False
