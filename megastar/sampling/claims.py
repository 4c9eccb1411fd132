"""Who draws which chunk: claims as files in a folder that all ranks see, no process group.

A claim is a file that only one process can create, and that its owner touches while it lives. A killed owner's claim
grows old and is taken over. Two owners of one chunk, should it ever come to that, write equal bytes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

STALE = 120.0  # seconds without a touch
TOUCH = 10.0


class Claims:
    """The claims in ``folder``; as a context manager it keeps its own alive."""

    def __init__(self, folder: Path):
        self.folder, self.mine = folder, (socket.gethostname(), os.getpid())
        self.held: Path | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Claims:
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.release()

    def take(self, name: str) -> bool:
        """Whether the claim ``name`` is now this process's; one whose owner is gone is taken over."""
        path = self.folder / f"{name}.claim"
        if path.exists() and not self._is_abandoned(path):
            return False
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as f:
            json.dump({"host": self.mine[0], "pid": self.mine[1]}, f)
        self.held = path
        return True

    def release(self) -> None:
        if self.held is not None:
            self.held.unlink(missing_ok=True)
            self.held = None

    def _keep_alive(self) -> None:
        while not self._stop.wait(TOUCH):
            held = self.held
            if held is not None:
                with suppress(OSError):  # released meanwhile, or the disk is away: the next touch may succeed
                    os.utime(held)

    def _is_abandoned(self, path: Path) -> bool:
        """True when the claim at ``path`` was of a process that is gone; it is then removed, by one process only."""
        try:
            owner = _owner(path)
            gone = owner is not None and owner[0] == self.mine[0] and not is_running(owner[1])
            if not gone and self._now() - path.stat().st_mtime < STALE:
                return False
            aside = path.with_name(f"{path.name}.{self.mine[0]}.{self.mine[1]}")
            path.rename(aside)
            aside.unlink()
        except FileNotFoundError:
            return False  # its owner has just finished
        return True

    def _now(self) -> float:
        """The time by the clock that stamps the files: another machine's may differ from ours."""
        probe = self.folder / f"clock.{self.mine[0]}.{self.mine[1]}"
        probe.write_bytes(b"")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now or time.time()


def _owner(path: Path) -> tuple[str, int] | None:
    """Host and process of a claim; None for one without words: being written, or left so by a killed process."""
    try:
        told = json.loads(path.read_text())
        return str(told["host"]), int(told["pid"])
    except (ValueError, KeyError, TypeError):
        return None


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
