"""metrics.jsonl as columns, thinned out for a page: memory and size are bounded, spikes stay."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megastar.run_dir.jsonl import iter_jsonl

POINTS = 1000  # of one value on the page; a screen has no more columns
MOST_BAD = 100  # steps whose value is not finite that are marked
WORDS = {"nan", "inf", "-inf"}  # JSON has no numbers for these: the writer makes words of them


@dataclass
class Column:
    """One value over the steps: ``steps`` rise, ``values`` may hold NaN and infinities."""

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    def put(self, step: int, value: float) -> None:
        """A later row of the same step wins, and takes back what an earlier process wrote past it."""
        self.cut(step)
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Forget ``step`` and all later ones."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def __len__(self) -> int:
        return len(self.steps)


def read_columns(path: Path) -> dict[str, Column]:
    """The numbers of metrics.jsonl by name, read a line at a time; without the file, none.

    Lines that a crash cut and values that are no numbers are passed over. Rows of a step that was done again, after a
    resume or a roll-back, replace the earlier ones.
    """
    columns: dict[str, Column] = {}
    newest = -1
    for row in iter_jsonl(path) if path.exists() else ():
        step = row.pop("step", None)
        if type(step) is not int or not 0 <= step < 2**53:
            continue
        if step < newest:
            for column in columns.values():
                column.cut(step)
        newest = step
        for name, value in row.items():
            if (number := _number(value)) is not None:
                columns.setdefault(name, Column()).put(step, number)
    return {name: column for name, column in columns.items() if len(column)}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value.strip().lower() not in WORDS:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def thin(column: Column, points: int = POINTS) -> dict[str, list]:
    """At most ``points`` of a column: ``x`` steps, ``y`` values (5 digits), and ``bad`` steps whose value is not finite.

    The first and the last point stay, and of each of as many equal stretches the smallest and the largest one, in
    their order: a spike of one step is still there.
    """
    steps, values = np.asarray(column.steps, np.int64), np.asarray(column.values, np.float64)
    finite = np.isfinite(values)
    bad = steps[~finite][:MOST_BAD].tolist()
    steps, values = steps[finite], values[finite]
    if len(steps) > points:
        assert points >= 4, points
        edges = np.linspace(1, len(steps) - 1, (points - 2) // 2 + 1).astype(np.int64)
        keep = {0, len(steps) - 1}
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            keep |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
        chosen = np.array(sorted(keep))
        steps, values = steps[chosen], values[chosen]
    return {"x": steps.tolist(), "y": [short(v) for v in values.tolist()], "bad": bad}


def short(value: float) -> float:
    """Five significant digits: more than a curve shows."""
    return float(f"{value:.5g}")


def hours(columns: dict[str, Column], points: int = 200) -> dict[str, list]:
    """Hours of training until a step, as ``x`` steps and ``y`` hours, from 0 on; pauses between resumes do not count.

    A row's ``step_s`` is the mean over the steps since the row before.
    """
    column = columns.get("step_s")
    if column is None:
        return {"x": [], "y": []}
    steps = np.asarray(column.steps, np.float64)
    seconds = np.nan_to_num(np.asarray(column.values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    since = np.diff(steps, prepend=0.0)
    if len(since) > 1:
        since[0] = min(since[0], since[1])  # rows that begin in the middle know nothing of what was before
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
