"""``events.jsonl`` of a run folder: what happened to the run, one JSON object a line, written by the main rank.

Unlike metrics.jsonl it is only ever appended to: what a crash took back stays on record.

    {"time": "2026-01-31T12:00:00+00:00", "host": "node3", "job": "417", "event": "saved", "step": 400, "text": "..."}

``event`` is one of ``KINDS``; ``job`` is there under SLURM; ``step`` counts finished optimizer steps.
"""

from __future__ import annotations

import json
import os
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from megastar.run_dir.jsonl import read_jsonl
from megastar.utils.clock import utc_now
from megastar.utils.hostname import host_name

NAME = "events.jsonl"
STARTED = ("started", "resumed")
ENDED = ("finished", "signal", "error", "hang", "lost")
KINDS = (*STARTED, *ENDED, "saved", "warning", "slow", "skipped", "rolled_back")
MOST = 10_000  # lines that wait for a disk
_waiting: dict[Path, deque[str]] = {}


def append_event(folder: Path, event: str, step: int, text: str, **more: Any) -> None:
    """Append one line, on the disk when this returns.

    A disk that takes none is no reason to stop a run: the line waits in memory, see ``flush_events``. ``situation`` and
    ``over`` among the other fields say that something lasts, and that it is over: ``open_situations``.
    """
    assert event in KINDS, event
    about = {"time": utc_now(), "host": host_name()}
    if job := os.environ.get("SLURM_JOB_ID"):
        about["job"] = job
    line = json.dumps({**about, "event": event, "step": step, "text": text, **more}) + "\n"
    _waiting.setdefault(folder, deque(maxlen=MOST)).append(line)
    flush_events(folder)


def flush_events(folder: Path) -> bool:
    """Write what the disk did not take before; whether nothing waits any more."""
    lines = _waiting.get(folder)
    if not lines:
        return True
    try:
        with (folder / NAME).open("a+b", buffering=0) as f:
            while lines:
                data = (b"\n" if _is_cut(f) else b"") + lines[0].encode()
                if f.write(data) != len(data):
                    return False  # the rest of the disk; what is cut counts for nothing
                lines.popleft()
            os.fsync(f.fileno())
    except OSError:
        return False
    return True


def open_situations(happened: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that say of something that it lasts, and after which nothing said that it is over."""
    lasting: dict[str, dict[str, Any]] = {}
    for event in happened:
        if event["event"] in (*STARTED, *ENDED):
            lasting.clear()
        elif name := event.get("situation"):
            lasting.pop(str(name), None)
            if not event.get("over"):
                lasting[str(name)] = event
    return list(lasting.values())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none without a file. Lines that a crash cut are passed over."""
    return [e for e in read_jsonl(folder / NAME) if "event" in e and "time" in e]


def seconds_of(event: dict[str, Any]) -> float:
    """When it happened, seconds since 1970; 0 for a time that cannot be read."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _is_cut(f: BinaryIO) -> bool:
    """Whether the file ends within a line, as a crash may leave it."""
    if not f.seek(0, os.SEEK_END):
        return False
    f.seek(-1, os.SEEK_END)
    return f.read(1) != b"\n"
