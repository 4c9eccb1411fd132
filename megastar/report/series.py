"""metrics.jsonl as columns, downsampled for the page: bounded memory and size, spikes are kept."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megastar.run_dir.jsonl import METRICS_ROW, iter_jsonl

POINTS = 1000  # of one value on the page
MAX_COLUMNS = 500  # names of values
MAX_NON_FINITE = 100  # marked steps with a non-finite value
NON_FINITE = {"nan", "inf", "-inf"}  # written as strings, since JSON has no such numbers


@dataclass
class Column:
    """One value by step: ``steps`` increase, ``values`` may contain NaN and infinities."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def append(self, step: int, value: float) -> None:
        """Add a value; it replaces those of this and later steps, which an earlier process wrote."""
        self.truncate(step)
        self.steps.append(step)
        self.values.append(value)

    def truncate(self, step: int) -> None:
        """Remove ``step`` and all later ones."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def __len__(self) -> int:
        return len(self.steps)


def read_columns(path: Path) -> dict[str, Column]:
    """The numbers of metrics.jsonl by name; empty without the file.

    Truncated lines and values that are not numbers are skipped. Rows of a step that was repeated, after a resume or a
    rollback, replace the earlier ones.
    """
    columns: dict[str, Column] = {}
    newest = -1
    for row in iter_jsonl(path, METRICS_ROW) if path.exists() else ():
        step = row.pop("step")
        if step < newest:
            for column in columns.values():
                column.truncate(step)
        newest = step
        for name, value in row.items():
            if (number := _number(value)) is not None and (name in columns or len(columns) < MAX_COLUMNS):
                columns.setdefault(name, Column()).append(step, number)
    return {name: column for name, column in columns.items() if len(column)}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value.strip().lower() not in NON_FINITE:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def thin(column: Column, points: int = POINTS) -> dict[str, list[Any]]:
    """At most ``points`` of a column: ``x`` steps, ``y`` values (5 digits), ``bad`` steps with a non-finite value.

    Keeps the first and the last point, and the minimum and maximum of equal intervals: a spike of one step is kept.
    """
    steps, values = np.asarray(column.steps, np.int64), np.asarray(column.values, np.float64)
    finite = np.isfinite(values)
    bad = steps[~finite][:MAX_NON_FINITE].tolist()
    steps, values = steps[finite], values[finite]
    if len(steps) > points:
        assert points >= 4, points
        edges = np.linspace(1, len(steps) - 1, (points - 2) // 2 + 1).astype(np.int64)
        keep = {0, len(steps) - 1}
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            keep |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
        chosen = np.array(sorted(keep))
        steps, values = steps[chosen], values[chosen]
    return {"x": steps.tolist(), "y": [float(f"{v:.5g}") for v in values.tolist()], "bad": bad}


def training_hours(columns: dict[str, Column], points: int = 200) -> dict[str, list[float]]:
    """Hours of training until a step: ``x`` steps, ``y`` hours, from 0; pauses between resumes are excluded.

    A row's ``step_s`` is the mean over the steps since the row before.
    """
    column = columns.get("step_s")
    if column is None:
        return {"x": [], "y": []}
    steps = np.asarray(column.steps, np.float64)
    seconds = np.nan_to_num(np.asarray(column.values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    since = np.diff(steps, prepend=0.0)
    if len(since) > 1:
        since[0] = min(since[0], since[1])  # the rows may not begin at step 0
    total = np.cumsum(since * seconds) / 3600
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).astype(np.int64))
    first = [0.0] if not len(since) or steps[0] == since[0] else [float(steps[0] - since[0])]
    return {"x": [*first, *steps[chosen].tolist()], "y": [0.0, *(float(f"{t:.6g}") for t in total[chosen])]}


def best(column: Column | None) -> tuple[float, int] | None:
    """The smallest finite value and its step."""
    if column is None:
        return None
    found = [(v, s) for v, s in zip(column.values, column.steps, strict=True) if math.isfinite(v)]
    return min(found) if found else None
