"""A file of lines that outlives its disk: what a full, read-only or lost disk does not take waits in memory."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.utils.files import write_atomic

SYNC_EVERY = 10.0  # seconds; a network disk says only at a sync that it is full
MOST = 100_000  # lines that wait; beyond that the oldest are given up


class Lines:
    """Append lines to ``path``, for one writer. No disk error comes out: ``problem`` holds the last one while lines wait.

    A line counts as kept once it was synced. After an error the file is cut back to there and all later lines are
    written again, in their order: none is lost and none is there twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem: OSError | None = None
        self.given_up = 0  # lines
        self._lines: deque[bytes] = deque()  # not synced yet
        self._written = 0  # how many of those are in the file
        self._good: int | None = None  # bytes of the file that are synced; None: it was not looked at
        self._end = 0
        self._fd: int | None = None
        self._synced = time.monotonic()

    @property
    def waiting(self) -> int:
        """Lines that are not in the file, or not for certain."""
        return len(self._lines) - self._written

    def append(self, line: str) -> bool:
        """``line`` ends without a newline. False: it waits."""
        self._lines.append(line.encode() + b"\n")
        if self.waiting > MOST:
            self._lines.popleft()
            self.given_up += 1
        return self.flush()

    def flush(self, sync: bool = False) -> bool:
        """Try to write what waits; whether nothing does any more."""
        try:
            fd = self._open() if self._fd is None else self._fd
            data = memoryview(b"".join(list(self._lines)[self._written :]))
            while data:
                n = os.pwrite(fd, data, self._end)
                data, self._end = data[n:], self._end + n
            self._written = len(self._lines)
            if sync or self.problem or time.monotonic() - self._synced >= SYNC_EVERY:
                os.fsync(fd)
                self._good, self._synced = self._end, time.monotonic()
                self._lines.clear()
                self._written = 0
        except OSError as error:
            self.problem = error
            self._drop()
            return False
        self.problem = None
        return True

    def cut(self, keep: Callable[[str], bool]) -> None:
        """Remove all lines that ``keep`` refuses. Those at the end need no room. Raises ``OSError``."""
        self.flush(sync=True)
        for line in [line for line in self._lines if not keep(line.decode())]:
            self._lines.remove(line)
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        kept = b"".join(line + b"\n" for line in data.splitlines() if keep(line.decode(errors="replace")))
        if kept != data:
            self._drop()
            if data.startswith(kept):
                os.truncate(self.path, len(kept))
            else:
                write_atomic(self.path, kept)
        self._good = len(kept)

    def close(self) -> None:
        self.flush(sync=True)
        self._drop()

    def _open(self) -> int:
        self._fd = fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(fd).st_size
        self._end = size if self._good is None else min(self._good, size)
        os.ftruncate(fd, self._end)  # what was not synced is written again
        self._good, self._written = self._end, 0
        return fd

    def _drop(self) -> None:
        """Close the file: after an error its handle may be stale."""
        fd, self._fd, self._written = self._fd, None, 0
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without lines that are none."""
    with suppress(OSError), path.open("rb") as f:
        return _objects(f)
    return []


def read_ends(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Of metrics.jsonl, in their order: the ``first`` and the ``last`` rows of training steps, the newest validation, and the
    ``last`` other rows. However long the run was, this is all that is held."""
    head: list[tuple[int, bytes]] = []
    steps, others, validated = (deque[tuple[int, bytes]](maxlen=n) for n in (last, last, 1))
    with suppress(OSError), path.open("rb") as f:
        for place in enumerate(f):
            if b'"loss_ar"' not in place[1]:
                (validated if b'"val_loss_ar"' in place[1] else others).append(place)
            elif len(head) < first:
                head.append(place)
            else:
                steps.append(place)
    return _objects(line for _, line in sorted([*head, *steps, *others, *validated]))


def _objects(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with suppress(ValueError):
            value = json.loads(line.decode(errors="replace"))
            if isinstance(value, dict):
                found.append(value)
    return found
