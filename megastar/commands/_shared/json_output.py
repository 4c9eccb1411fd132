"""JSON on standard output: its keys, which are documented in docs/command_line.md, and nothing beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DoctorReport:
    """``megastar doctor --json``. ``checks``: name, level, finding, remedy, nodes, everywhere."""

    ok: bool  # no check failed
    nodes: list[str]
    ranks: int
    checks: list[dict[str, Any]]


@dataclass(frozen=True)
class PlanReport:
    """``megastar plan --json``; bytes and seconds. ``plans``: ``parallel.cost.Plan`` with what is derived from it."""

    model: str
    dtype: str
    global_batch: int
    machine: Any
    flops: dict[str, int]
    feature_bytes: dict[str, int]  # of stored features: of a crop, of a step; 0 without alignment
    recommended: dict[str, Any] | None
    plans: list[dict[str, Any]]
    assumptions: dict[str, str]


@dataclass(frozen=True)
class SetReport:
    """``megastar data inspect --json``."""

    set: str
    samples: int
    shards: int
    samples_a_shard: str
    bytes: int
    classes: int
    class_names: list[str]
    grid: str
    tokenizer_sha256: str
    features: dict[str, Any]
    layout: str
    dtype: str
    views: int
    crops: str
    tokens: int
    codebook_size: int
    image_size: int
    made_by: dict[str, Any]
    skipped: list[dict[str, Any]]
    class_counts: Any
    first: list[dict[str, Any]]


# The keys that ``megastar evaluate --json`` and the file of --out always hold, except with --fdr (evaluation/fd_ratio.py); a metric adds its own details.
SCORE_KEYS = (
    *("metric", "value", "scores", "warnings", "real", "features", "settings", "versions", "device", "seconds"),
    *("provenance", "not_recorded"),
)


def plain(value: Any) -> Any:
    """``value`` as JSON: dataclasses become objects, non-finite numbers strings ("nan", "inf", "-inf")."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_line(value: Any) -> str:
    """``value`` as JSON on one line."""
    return json.dumps(plain(value), allow_nan=False)


@contextmanager
def only_json(wanted: bool) -> Iterator[Callable[[object], None]]:
    """In the block, standard output goes to standard error, also that of libraries and child processes. The yielded
    function prints an object to the true standard output. Does nothing unless ``wanted``."""

    def show(value: object) -> None:
        text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
        if fd >= 0:
            with os.fdopen(os.dup(fd), "w") as out:
                out.write(text)
        else:
            stdout.write(text)
            stdout.flush()

    stdout, fd = sys.stdout, -1
    if not wanted:
        yield show
        return
    with suppress(OSError, ValueError, AttributeError):
        if stdout.fileno() == 1:  # not a stream of a test or of a program that calls main
            stdout.flush()
            fd = os.dup(1)
            os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield show
    finally:
        if fd >= 0:
            os.dup2(fd, 1)
            os.close(fd)
