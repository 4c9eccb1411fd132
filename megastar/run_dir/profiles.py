"""RUN/profile: what ``train.profile`` wrote, for each rank a trace, a table and its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megastar.errors import UserError
from megastar.run_dir.layout import PROFILE
from megastar.utils.json_file import (
    FILE_NAME,
    core,
    integer,
    list_of,
    optional,
    read_json,
    record,
    shown,
    text,
    validator,
)

MOST_BYTES = 8 << 20
_NAME = re.compile(r"rank(\d{1,7})-steps(\d{1,9})-(\d{1,9})\.json", re.ASCII)
_SECONDS = core.float_schema(ge=0, le=1e9, allow_inf_nan=False)
_ROW = record(
    {"name": text(100_000), "calls": integer(), "seconds": _SECONDS}, {"phase": text(1000), "device_seconds": _SECONDS}
)
_ROWS = list_of(_ROW, high=10_000)
_SUMMARY = validator(
    record(
        {
            "rank": integer(), "ranks": integer(1), "device": text(1000), "first": integer(1), "steps": integer(1),
            "seconds": _SECONDS, "trace": FILE_NAME, "phases": _ROWS, "operators": _ROWS, "kernels": _ROWS,
            "host_syncs": _ROWS,
        },
        {"memory": optional(FILE_NAME), "torch": text(100)},
    )
)  # fmt: skip


class ProfileFiles(NamedTuple):
    """The files of one rank."""

    summary: Path
    table: Path
    trace: Path  # Chrome trace
    memory: Path  # snapshot of the CUDA allocator


def profile_files(run: Path, rank: int, first: int, last: int) -> ProfileFiles:
    """Those of the steps ``first`` to ``last``, counted from 1."""
    stem = f"rank{rank}-steps{first}-{last}"
    names = (f"{stem}.json", f"{stem}.txt", f"{stem}.trace.json.gz", f"{stem}.memory.pickle")
    return ProfileFiles(*(run / PROFILE / name for name in names))


def read_profiles(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The summaries of a run, by first step and rank. Raises ``UserError`` if the run has no profile, or for a damaged summary."""
    folder = run / PROFILE
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: name a run folder")
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(m[2]), int(m[1]), m[0]) for name in names if (m := _NAME.fullmatch(name)))
    if not found:
        raise UserError(
            f"{run} has no profile: run megastar train with train.profile.steps=3 (and train.profile.start, the steps before "
            "the first profiled one)"
        )
    return [
        (folder / name, read_json(folder / name, _SUMMARY, "profile the run again", MOST_BYTES)) for _, _, name in found
    ]


TABLES = (  # key, title, what a row is
    ("phases", "phases of a step", "phase"),
    ("kernels", "kernels on the device", "kernel"),
    ("operators", "operators, time of their own on the host", "operator"),
    ("host_syncs", "host synchronizations", "call"),
)


def table_rows(summary: dict[str, Any], key: str, most: int) -> Iterator[tuple[str, str, str, str]]:
    """(name, calls per step, milliseconds per step, share of a step's time), the longest first."""
    steps, step_seconds = summary["steps"], summary["seconds"] / summary["steps"]
    for row in summary[key][:most]:
        seconds = row["seconds"] / steps
        share = f"{seconds / step_seconds:.1%}" if step_seconds else ""
        name = shown(row["name"], 100) + (f" in {shown(row['phase'])}" if row.get("phase") else "")
        yield name, f"{row['calls'] / steps:.4g}", f"{seconds * 1000:.2f}", share


def headline(summary: dict[str, Any]) -> str:
    last = summary["first"] + summary["steps"] - 1
    ms = summary["seconds"] / summary["steps"] * 1000
    return (
        f"rank {summary['rank']} of {summary['ranks']}, {shown(summary['device'])}: steps {summary['first']} to {last}, "
        f"{ms:.1f} ms a step while profiled"
    )


def table_text(summary: dict[str, Any], most: int = 40) -> str:
    """The tables as plain text."""
    lines = [headline(summary)]
    for key, title, what in TABLES:
        if rows := list(table_rows(summary, key, most)):
            lines += ["", title, f"{'ms/step':>10} {'share':>7} {'calls/step':>10}  {what}"]
            lines += [f"{ms:>10} {share:>7} {calls:>10}  {name}" for name, calls, ms, share in rows]
    return "\n".join(lines) + "\n"
