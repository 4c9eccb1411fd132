"""JSON Lines files of a run folder: appending while a disk is full or read-only, and reading past damaged lines."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import SchemaValidator, from_json

from megastar.errors import UserError
from megastar.utils.files import atomic_file, ends_within_line, open_regular
from megastar.utils.json_file import ANY, dict_of, integer, record, text, validator

MAX_BYTES = 4 << 30  # of metrics.jsonl: ten million rows
MAX_EVENTS = 32 << 20  # bytes of a file that is held in memory
MAX_LINE = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")  # in names of files that are not UTF-8
_ROW = validator(dict_of(text(200), ANY))
METRICS_ROW = validator(record({"step": integer()}))  # values are compared where they are used: see finite
MAX_PENDING = 100_000  # rows buffered in memory; beyond that the oldest are dropped


class JsonlWriter:
    """Append rows to ``path``. A disk error is not raised but kept in ``error``, and the rows stay in ``pending`` until a
    later ``append`` or ``flush`` writes them.

    The file is synced at most every ``sync_every`` seconds. A network disk may report only at a sync that it is full: the
    rows since the last one are then written again, unless ``sync_every`` is 0, for files with several writers."""

    def __init__(self, path: Path, sync_every: float = 10.0):
        self.path, self.sync_every = path, sync_every
        self.pending: deque[bytes] = deque()
        self._dropped = 0  # rows, since the last ``take_dropped``
        self.error: OSError | None = None
        self._unsynced: deque[bytes] = deque()  # in the file since the last sync
        self._good: int | None = None  # synced bytes of the file; None: unknown
        self._rewrite = False  # truncate the file to the synced bytes first
        self._synced = time.monotonic()
        self._lock = threading.Lock()

    def append(self, row: Mapping[str, Any]) -> bool:
        """False: the row is pending."""
        self.pending.append(json.dumps(row).encode() + b"\n")
        return self.flush()

    def flush(self, sync: bool = False) -> bool:
        """Write the pending rows; whether all are written."""
        with self._lock:
            try:
                with self.path.open("a+b", buffering=0) as f:
                    size = f.seek(0, os.SEEK_END)
                    self._good = size if self._good is None else min(self._good, size)
                    if self._rewrite:
                        f.truncate(self._good)
                    while self.pending:
                        line = (b"\n" if ends_within_line(f) else b"") + self.pending[0]
                        if (written := f.write(line)) < len(line):
                            f.truncate(f.tell() - written)
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                        self._unsynced.append(self.pending.popleft())
                    if sync or self._rewrite or time.monotonic() - self._synced >= self.sync_every:
                        os.fsync(f.fileno())
                        self._synced, self._good = time.monotonic(), f.seek(0, os.SEEK_END)
                        self._unsynced.clear()
                        self._rewrite = False
                self.error = None
            except OSError as error:
                self.error = error
                if self.sync_every and (self._rewrite or not self.pending):  # a sync failed, not a write
                    self.pending.extendleft(reversed(self._unsynced))
                    self._unsynced.clear()
                    self._rewrite = True
                while len(self.pending) > MAX_PENDING:
                    self.pending.popleft()
                    self._dropped += 1
        return self.error is None

    def take_dropped(self) -> int:
        """The number of rows dropped since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def cut_after(self, step: int) -> None:
        """Remove the rows of steps after ``step``, and damaged lines. Needs no free space where they are the last ones.
        Raises ``OSError``, and ``UserError`` for a file that is far too large."""
        self.flush(sync=True)
        self.pending = deque(line for line in self.pending if _step(line) <= step)
        kept, in_place, size = 0, True, 0
        if self.path.is_file():
            with open_regular(self.path) as f:
                size = os.fstat(f.fileno()).st_size
                if size > MAX_BYTES:
                    raise UserError(
                        f"{self.path} has {size} bytes, at most {MAX_BYTES} are read: move it to another place"
                    )
                end = (self._good or 0) if self._rewrite else size  # the rest is pending
                for line, start in _kept(f, step, end):
                    in_place = in_place and start == kept and line.endswith(b"\n")
                    kept += len(line.removesuffix(b"\n")) + 1
                if not in_place:
                    f.seek(0)
                    with atomic_file(self.path) as temporary, temporary.open("wb") as out:
                        out.writelines(line.removesuffix(b"\n") + b"\n" for line, _ in _kept(f, step, end))
                        out.flush()
        if in_place and kept < size:
            os.truncate(self.path, kept)
        self._good = kept
        self._unsynced.clear()


def iter_jsonl(path: Path, schema: SchemaValidator | None = None, most: int = MAX_BYTES) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that fit ``schema``; other lines, such as one truncated by a crash, are skipped.

    Reads at most the last ``most`` bytes. Raises ``OSError``, and ``UserError`` for a path that is not a regular file.
    """
    with _opened(path, most) as f:
        yield from _objects(_lines(f), schema)


def read_jsonl(path: Path, schema: SchemaValidator | None = None, most: int = MAX_BYTES) -> list[dict[str, Any]]:
    """``iter_jsonl`` as a list; empty for a file that cannot be read."""
    with suppress(OSError, UserError):
        return list(iter_jsonl(path, schema, most))
    return []


def read_ends(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    """The rows at both ends of metrics.jsonl, in file order: the ``first`` and the ``last`` rows of training steps, the
    newest validation, and the ``last`` other rows. Memory does not grow with the length of the run."""
    head: list[tuple[int, bytes]] = []
    steps, others, validated = (deque[tuple[int, bytes]](maxlen=n) for n in (last, last, 1))
    with suppress(OSError, UserError), _opened(path) as f:
        for numbered in enumerate(_lines(f)):
            if b'"loss_ar"' not in numbered[1]:
                (validated if b'"val_loss_ar"' in numbered[1] else others).append(numbered)
            elif len(head) < first:
                head.append(numbered)
            else:
                steps.append(numbered)
    return list(_objects((line for _, line in sorted([*head, *steps, *others, *validated])), METRICS_ROW))


def _opened(path: Path, most: int = MAX_BYTES) -> BinaryIO:
    """At the beginning, or at the last ``most`` bytes."""
    f = open_regular(path)
    f.seek(max(0, os.fstat(f.fileno()).st_size - most))
    return f


def _lines(f: BinaryIO) -> Iterator[bytes]:
    """The lines of at most ``MAX_LINE`` bytes."""
    while line := f.readline(MAX_LINE):
        if line.endswith(b"\n") or len(line) < MAX_LINE:
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = f.readline(MAX_LINE)


def _kept(f: BinaryIO, step: int, end: int) -> Iterator[tuple[bytes, int]]:
    """(line, its place) of the rows up to ``step`` in the first ``end`` bytes."""
    for line in _lines(f):
        if (at := f.tell()) > end:
            return
        if _step(line) <= step:
            yield line, at - len(line)


def _objects(lines: Iterable[bytes], schema: SchemaValidator | None = None) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):  # ValidationError is one
            line = line if line.isascii() else line.decode(errors="replace").encode()
            try:
                value = from_json(line)
            except ValueError:
                value = from_json(_SURROGATE.sub(b"?", line))
            (schema or _ROW).validate_python(value)
            yield value


def _step(line: bytes) -> float:
    """The step of a row; infinite for a damaged line."""
    step = next((row.get("step") for row in _objects([line])), None)
    return step if type(step) is int else float("inf")
