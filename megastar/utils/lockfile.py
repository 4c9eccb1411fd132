"""Lock files for processes that share only a folder: no ranks, no messages.

``NAME.claim`` in the folder is held by one process, because it is created with O_CREAT | O_EXCL. Its holder renews the
file's time. The lock is stale when its holder has exited (on the same machine) or its time is too old (on another). If
two processes ever hold the same lock, they do the same work twice, without harm: they write equal files by rename.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RENEW_EVERY = 5.0  # seconds
LIMIT = 120.0  # seconds without a renewal, by the file server's clock, after which a lock is stale


class Claims:
    """This process's locks in ``folder``, which must exist. Within ``with``, a thread renews them."""

    def __init__(self, folder: Path, renew_every: float = RENEW_EVERY, limit: float = LIMIT):
        self.folder, self.renew_every, self.limit = folder, renew_every, limit
        self.token = uuid.uuid4().hex
        self.holder = {"machine": machine(), "pid": os.getpid(), "start": start_of(os.getpid()), "token": self.token}
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock files", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path.stem)

    def take(self, name: str) -> bool:
        """Acquire the lock ``name``; False if another process holds it. Raises ``FileNotFoundError`` without the folder."""
        path = self.folder / f"{name}.claim"
        while True:
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if not self._is_stale(path) or not self._remove_stale(path):
                    return False
                continue
            with os.fdopen(fd, "w") as f:
                f.write(json.dumps(self.holder))
            self._held.add(path)
            return True

    def _remove_stale(self, path: Path) -> bool:
        """Remove a lock that was found stale; False if another process was faster and holds it now."""
        taken = path.with_name(f"{path.name}.{self.token}")  # a unique name: others may do the same
        try:
            path.rename(taken)
        except FileNotFoundError:
            return True
        try:
            if self._is_stale(taken):
                return True
            with suppress(FileExistsError):  # it was renewed: give it back
                os.link(taken, path)
            return False
        finally:
            taken.unlink(missing_ok=True)

    def release(self, name: str) -> None:
        path = self.folder / f"{name}.claim"
        self._held.discard(path)
        with suppress(OSError, ValueError):
            if json.loads(path.read_text())["token"] == self.token:  # otherwise another process has taken it over
                path.unlink()

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Release an acquired lock at the end of the block."""
        try:
            yield
        finally:
            self.release(name)

    def _is_stale(self, path: Path) -> bool:
        """Whether the holder of a lock is gone."""
        try:
            content, age = path.read_text(), file_server_time(self.folder) - path.stat().st_mtime
        except FileNotFoundError:
            return False
        try:
            other = json.loads(content)
            if other["machine"] == self.holder["machine"] and start_of(other["pid"]) != other["start"]:
                return True
        except (ValueError, KeyError, TypeError):  # not written yet, or its holder was killed before writing it
            return age > self.renew_every
        return age > self.limit

    def _renew(self) -> None:
        while not self._stop.wait(self.renew_every):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)


def file_server_time(folder: Path) -> float:
    """Seconds since 1970 by the clock that dates the files of ``folder``, possibly that of a file server."""
    path = folder / f".{uuid.uuid4().hex}.now"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def machine() -> str:
    """Identifies this boot of this machine and the PID namespace (containers have their own)."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def is_running(pid: int) -> bool:
    """Whether a process ``pid`` exists on this machine and is not a zombie."""
    return bool(start_of(pid))


def start_of(pid: int) -> str:
    """The start time of process ``pid`` in kernel ticks; empty if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
