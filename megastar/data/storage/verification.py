"""Compares shards with their SHA-256 before they are read: once for all processes of a node that run at the same time.

A process that has verified a file keeps a shared lock on one byte of an empty file in /dev/shm until it ends; the byte
is chosen by the file's device, inode, size, times and expected hash. Another process that finds the byte locked does
not need to hash the file again. The kernel releases the locks when the process ends, so nothing is recorded beyond the
run: the second of two runs finds a file that was damaged between them, even if its times are unchanged.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from megastar.data.storage.errors import Stopped
from megastar.data.storage.shard_info import ShardInfo
from megastar.utils.own_files import open_own

_CHUNK = 1 << 20  # bytes between checks whether to stop
_POLL = 0.02  # seconds between checks of another process's work
_PATIENCE = 120.0  # seconds; the process that hashes a shard may be suspended
_MINE, _DONE, _BUSY = range(3)


class BeingVerified(Exception):
    """Another process or thread of this node is hashing the file."""


class Verifier:
    """Verified files of one store, shared with the other stores and processes of this user on this node.

    ``ctime``: also tell files apart by the time of their last change, which nobody can set back. The node's cache sets
    the time of use of its files, which counts as a change.
    """

    def __init__(self, ctime: bool) -> None:
        self._ctime = ctime
        self._mutex = threading.Lock()
        self._verified: set[int] = set()
        self._hashing: set[int] = set()
        self._locks: BinaryIO | None = None
        with suppress(OSError, AttributeError):  # on failure, each store hashes the files itself
            assert fcntl.F_OFD_SETLK  # Linux
            self._locks = open_own(Path(f"/dev/shm/megastar-{os.geteuid()}.locks"), os.O_RDWR | os.O_CREAT, 0o600)

    def digest(self, f: BinaryIO, info: ShardInfo, stop: threading.Event, wait: bool = True) -> str:
        """The SHA-256 of an open shard, computed unless a running process of this node has already compared it.

        ``stop`` ends the call with ``Stopped``. Without ``wait``, raises ``BeingVerified`` for a file that is being
        hashed elsewhere. Raises ``OSError`` of a failing disk.
        """
        key, started = self._key(f, info), time.monotonic()
        while (claim := self._claim(key, time.monotonic() - started < _PATIENCE)) == _BUSY:
            if not wait:
                raise BeingVerified
            if stop.wait(_POLL):
                raise Stopped
        if claim == _DONE:
            return info.sha256
        found = ""
        try:
            found = _sha256(f.fileno(), stop)
            return found
        finally:
            self._settle(key, found == info.sha256)

    def trust(self, f: BinaryIO, info: ShardInfo) -> None:
        """Record a file that was hashed while it was written."""
        self._settle(self._key(f, info), True)

    def version(self, f: BinaryIO) -> tuple[int, ...]:
        """A value that changes when the content of an open file changes."""
        s = os.fstat(f.fileno())
        return (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns if self._ctime else 0)

    def _key(self, f: BinaryIO, info: ShardInfo) -> int:
        text = f"{self.version(f)} {info.sha256}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def _claim(self, key: int, patient: bool) -> int:
        with self._mutex:
            if key in self._verified:
                return _DONE
            if key in self._hashing:
                return _BUSY
            if not self._lock(key, fcntl.F_WRLCK):
                if self._lock(key, fcntl.F_RDLCK):
                    self._verified.add(key)
                    return _DONE
                if patient:
                    return _BUSY
            self._hashing.add(key)
            return _MINE

    def _settle(self, key: int, good: bool) -> None:
        with self._mutex:
            self._hashing.discard(key)
            self._lock(key, fcntl.F_RDLCK if good else fcntl.F_UNLCK)
            if good:
                self._verified.add(key)

    def _lock(self, key: int, kind: int) -> bool:
        """Set this store's lock on byte ``key``; returns whether no other store's lock prevents it."""
        if self._locks is None:
            return True
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, key, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no locks on this file system
            self._locks = None
        return True


def _sha256(fd: int, stop: threading.Event) -> str:
    """Hash a file with plain reads: mapped pages would count as memory of this process."""
    digest, buffer, at = hashlib.sha256(), bytearray(_CHUNK), 0
    while n := os.preadv(fd, [buffer], at):
        if stop.is_set():
            raise Stopped
        digest.update(memoryview(buffer)[:n])
        at += n
    return digest.hexdigest()
