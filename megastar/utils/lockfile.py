"""Who does what, among processes that share nothing but a folder: no ranks, no messages.

``NAME.claim`` in the folder says that a process is at work on NAME. It was made by O_CREAT | O_EXCL, so one process has
it, and its time is renewed while the process lives. It counts no longer when its process is gone, which is seen at once
on the same machine, and from another machine when its time stands still. Two that work on the same thing after all do
double work and no harm: what they write is equal and appears by rename.
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

BEAT = 5.0  # seconds between renewals
LIMIT = 120.0  # seconds without a renewal, by the file server's clock, after which a claim counts no longer


class Claims:
    """The claims of this process in ``folder``, which must exist. ``with`` it: a thread renews them."""

    def __init__(self, folder: Path, beat: float = BEAT, limit: float = LIMIT):
        self.folder, self.beat, self.limit = folder, beat, limit
        self.token = uuid.uuid4().hex
        self.me = {"machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid()), "token": self.token}
        self._held: set[Path] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for path in list(self._held):
            self.release(path.stem)

    def take(self, name: str) -> bool:
        """Claim ``name``; False when another process is at it. Raises ``FileNotFoundError`` without the folder."""
        path = self.folder / f"{name}.claim"
        while True:
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if not self._is_void(path):
                    return False
                with suppress(FileNotFoundError):  # by a name of our own: another may do the same
                    gone = path.with_name(f"{path.name}.{self.token}")
                    path.rename(gone)
                    gone.unlink()
                continue
            with os.fdopen(fd, "w") as f:
                f.write(json.dumps(self.me))
            self._held.add(path)
            return True

    def release(self, name: str) -> None:
        path = self.folder / f"{name}.claim"
        self._held.discard(path)
        with suppress(OSError, ValueError):
            if json.loads(path.read_text())["token"] == self.token:  # else another process took it over
                path.unlink()

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Release a claim that ``take`` gave, however the block ends."""
        try:
            yield
        finally:
            self.release(name)

    def _is_void(self, path: Path) -> bool:
        """Whether the holder of a claim is gone."""
        try:
            held, age = path.read_text(), self.now() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        try:
            other = json.loads(held)
            if other["machine"] == self.me["machine"] and _start(other["pid"]) != other["start"]:
                return True
        except (ValueError, KeyError, TypeError):  # killed, or not yet done, between making and filling it
            return age > self.beat
        return age > self.limit

    def now(self) -> float:
        """The file server's clock, by which it stamps what is written."""
        path = self.folder / f"{self.token}.now"
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._over.wait(self.beat):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)


def _machine() -> str:
    """This machine since it was started, and the space of process numbers: a container has its own."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id",):
        with suppress(OSError):
            parts.append(Path(path).read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number, not ended."""
    return bool(_start(pid))


def _start(pid: int) -> str:
    """When process ``pid`` began, in the kernel's ticks; empty when there is none or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
