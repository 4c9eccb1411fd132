"""Time stamps and durations."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """ "40 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"."""
    if seconds < 1:
        return f"{seconds:.1g} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for name, size in units:
        if rest >= size or parts:
            parts.append((rest // size, name))
            rest %= size
    return " ".join(f"{n} {name}" for n, name in parts[:2] if n)
