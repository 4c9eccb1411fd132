"""``events.jsonl`` of a run folder: what happened to the run, one JSON object a line, written by the main rank.

Unlike metrics.jsonl it is append-only: events of steps that a resume repeats stay on record.

    {"time": "2026-01-31T12:00:00+00:00", "host": "node3", "job": "417", "event": "saved", "step": 400, "text": "..."}

``event`` is one of ``KINDS``; ``job`` is there under SLURM; ``step`` counts finished optimizer steps.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from megastar.run_dir import lease
from megastar.run_dir.jsonl import MAX_EVENTS, JsonlWriter, read_jsonl
from megastar.utils.clock import utc_now
from megastar.utils.hostname import host_name
from megastar.utils.json_file import ANY, dict_of, integer, optional, record, text, validator
from megastar.utils.redact import redact

NAME = "events.jsonl"
STARTED = ("started", "resumed")
ENDED = ("finished", "signal", "error", "hang", "lost")
KINDS = (*STARTED, *ENDED, "saved", "warning", "slow", "skipped", "rolled_back", "mesh_changed", "evaluated")
NOT_UPLOADED = " was not uploaded to "  # in the text about an upload that failed
_EVENT = validator(
    record(
        {"time": text(100), "event": text(100)},
        {
            "step": integer(), "steps": optional(integer()), "ranks": integer(1, 1 << 24), "text": text(), "host": text(1000),
            "job": text(1000), "command": text(), "device": text(1000), "packages": dict_of(text(200), ANY),
        },
    )
)  # fmt: skip
_writers: dict[Path, JsonlWriter] = {}


def append_event(folder: Path, event: str, step: int, text: str, **fields: Any) -> None:
    """Append one line, synced to the disk when this returns.

    On a disk error the line stays in memory and the next call, or ``flush_events``, retries. The fields ``situation`` and
    ``over`` mark the beginning and the end of a lasting condition: see ``open_situations``. Nothing is written into a
    folder that another process has taken over.
    """
    assert event in KINDS, event
    if lease.held_elsewhere(folder):
        return
    writer = _writers.setdefault(folder, JsonlWriter(folder / NAME, sync_every=0.0))
    row = time_and_job() | {"host": host_name(), "event": event, "step": step, "text": redact(text)}
    writer.append({**row, **{k: redact(v) if isinstance(v, str) else v for k, v in fields.items()}})


def time_and_job() -> dict[str, Any]:
    """The fields ``time`` and, under SLURM, ``job`` of a row."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"time": utc_now()} | ({"job": job} if job else {})


def flush_events(folder: Path) -> bool:
    """Write the lines that are still pending after a disk error; whether all are written."""
    return folder not in _writers or not _writers[folder].pending or _writers[folder].flush()


def open_situations(happened: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest event of each situation that is not over."""
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
    """The events of a run, oldest first; none without a file. Damaged lines are skipped."""
    return read_jsonl(folder / NAME, _EVENT, MAX_EVENTS)


def seconds_of(event: dict[str, Any]) -> float:
    """Seconds since 1970; 0 for an invalid time."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
