"""A folder of this node that keeps shards read from afar, shared by all processes of the node.

A shard lies there under its SHA-256, so runs share it and a changed one never passes for it. Kernel locks (flock) are
the whole protocol: they end with the process that holds them, however it ends.

    SHA.tar    whole: checked and synced before it got this name. Who maps it holds a shared lock, who removes it needs
               an exclusive one
    SHA.idx    where the samples lie in it: a help that may be missing or wrong, and goes when the shard goes
    SHA.part   being fetched by the process that holds its exclusive lock; nobody holds it: a left-over
    lock       held while room is made
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megastar.data.storage.errors import CacheFull
from megastar.data.storage.shard_info import most_of_index
from megastar.errors import UserError
from megastar.utils.files import read_small, sync_folder, write_atomic

if TYPE_CHECKING:
    from megastar.data.storage.shard_info import ShardInfo


INDEX = ".idx"  # beside SHA.tar
_SOON = 60.0  # seconds in which an index is written


class ShardCache:
    """``folder`` (empty: one a user in the temp folder) with at most ``bound`` bytes, the shards in use not counted.

    Raises ``UserError`` for a folder that cannot be used.
    """

    def __init__(self, folder: str | Path, bound: int):
        self.bound = bound
        own = Path(tempfile.gettempdir()) / f"megastar-{os.getuid()}"
        self.folder = Path(folder or own)
        try:
            self.folder.mkdir(mode=0o755 if folder else 0o700, parents=True, exist_ok=True)
            if not folder and (own.is_symlink() or own.stat().st_uid != os.getuid()):
                raise UserError(f"{own} belongs to another user: name a folder of your own as data.cache")
            with self._making_room():
                self._sweep()
        except OSError as error:
            raise UserError(
                f"data.cache = {self.folder} cannot be used ({error}): name a folder on a disk of this node"
            ) from error

    def open(self, info: ShardInfo) -> BinaryIO | None:
        """The shard, kept from removal while this file or a map of it lives; None when it is not here."""
        path = self._path(info)
        while True:
            try:
                f = path.open("rb")
            except OSError:  # not there, or on a disk that is lost
                return None
            fcntl.flock(f, fcntl.LOCK_SH)
            if _is_at(f, path):
                break
            f.close()  # removed while we waited for the lock
        if os.fstat(f.fileno()).st_size != info.bytes:
            if _is_at(f, path):  # somebody cut it: fetch it again, whoever still reads what is left of it
                path.unlink(missing_ok=True)
            f.close()
            return None
        with suppress(OSError):  # another user's file
            os.utime(path)  # the order of removal
        return f

    def claim(self, info: ShardInfo) -> BinaryIO | None:
        """The temporary file of a shard, for the one process that shall fetch it; None when another one is at it."""
        part = self._part(info)
        while True:
            try:
                f = open(part, "r+b", opener=_create)  # noqa: SIM115
            except OSError as error:
                raise self.full(info, error) from error
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.close()
                return None
            if not _is_at(f, part):  # finished or swept between the two calls
                f.close()
                continue
            if self._path(info).exists():
                self.discard(f, info)
                return None
            os.ftruncate(f.fileno(), 0)
            return f

    def reserve(self, part: BinaryIO, info: ShardInfo, must: bool) -> bool:
        """Make room for a claimed shard, least recently used first, never what is in use.

        Where what is in use leaves too little, False, or with ``must`` the bound is passed. On a disk that others fill,
        all that is not in use may go. Raises ``CacheFull`` where that is not enough.
        """
        try:
            return self._reserve(part, info, must)
        except OSError as error:
            raise self.full(info, error) from error

    def _reserve(self, part: BinaryIO, info: ShardInfo, must: bool) -> bool:
        with self._making_room():
            held = []
            for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
                with suppress(FileNotFoundError):
                    found = path.stat()
                    held.append((found.st_mtime_ns, found.st_size + _size(path.with_suffix(INDEX)), path))
            used = info.bytes + sum(size for _, size, _ in held)
            oldest = deque((size, path) for _, size, path in sorted(held) if path.suffix == ".tar")

            def remove_one() -> int:
                size, path = oldest.popleft()
                if not _remove(path):
                    return 0
                path.with_suffix(INDEX).unlink(missing_ok=True)
                return size

            while used > self.bound and oldest:
                used -= remove_one()
            if used > self.bound and not must:
                return False
            while True:
                try:
                    os.posix_fallocate(part.fileno(), 0, max(1, info.bytes))
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (must and oldest):
                        raise
                    remove_one()

    def keep(self, part: BinaryIO, info: ShardInfo) -> BinaryIO:
        """Give a whole and checked shard its name. Returns it as ``open`` does."""
        try:
            os.fsync(part.fileno())
            self._part(info).rename(self._path(info))
            sync_folder(self.folder)
        except OSError as error:
            raise self.full(info, error) from error
        fcntl.flock(part, fcntl.LOCK_SH)
        return part

    def discard(self, part: BinaryIO, info: ShardInfo) -> None:
        """Give a claim up."""
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
        """What ``keep_index`` kept, unchecked."""
        return read_small(self._path(info).with_suffix(INDEX), most_of_index(info))

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        """Keep the index of a shard that is open; without a word where that is not possible."""
        if self._path(info).exists():
            with suppress(OSError):
                write_atomic(self._path(info).with_suffix(INDEX), data)

    def full(self, info: ShardInfo, error: OSError) -> CacheFull:
        return CacheFull(
            f"{info.name} ({info.bytes} bytes) cannot be written to the cache {self.folder} ({error.strerror}): make room there, or name another data.cache"
        )

    def _path(self, info: ShardInfo) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", info.sha256):  # it comes from afar, and a path may not
            raise UserError(f"the manifest says {info.sha256!r} is the SHA-256 of {info.name}: pretokenize again")
        return self.folder / f"{info.sha256}.tar"

    def _part(self, info: ShardInfo) -> Path:
        return self._path(info).with_suffix(".part")

    def _sweep(self) -> None:
        for part in self.folder.glob("*.part"):
            _remove(part)
        for index in self.folder.glob(f"*{INDEX}"):
            if not index.with_suffix(".tar").exists():
                index.unlink(missing_ok=True)
        for left in self.folder.glob("*.tmp"):  # an index that was being written
            if time.time() - _written(left) > _SOON:
                left.unlink(missing_ok=True)

    @contextmanager
    def _making_room(self) -> Iterator[None]:
        with open(self.folder / "lock", "r+b", opener=_create) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _written(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return time.time()


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _is_at(f: BinaryIO, path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> bool:
    """Remove a file that nobody holds; whether it is gone."""
    try:
        with path.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(f, path):
                return False
            path.unlink()
            return True
    except OSError:  # in use, gone, or another user's
        return False
