"""``evaluations.jsonl`` of a run folder: the scores of samples that were drawn while the run trained, one a line.

    {"step": 400, "epoch": 5.0, "metric": "FID", "value": 31.4, "samples": 5000, "cfg_scale": 1.0, "weights": "ema",
     "against": "VIRTUAL_imagenet256_labeled.npz", "key": "3f9a...", "seconds": 120.3, "time": "2026-01-31T12:00:00+00:00"}

The file is append-only: a step that is repeated, after a resume or a rollback, gets a new line if its weights differ. A line's
``rollbacks`` counts the rollbacks before it: one that a later rollback discarded the weights of is not read.
``key`` is a hash of everything that a score depends on, the weights included. ``reference`` has the hash, the subset and the number of
the real images, ``labels`` how the classes of the samples were chosen: scores that differ in them are not one curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megastar.run_dir import lease
from megastar.run_dir.checkpoint_dir import NAME, step_in
from megastar.run_dir.jsonl import MAX_EVENTS, read_jsonl
from megastar.run_dir.layout import EVALUATING, EVALUATIONS
from megastar.run_dir.rollbacks import read_rollbacks
from megastar.utils.files import append_line
from megastar.utils.json_file import FLOAT, integer, one_of, record, text, validator

Record = dict[str, Any]
_RECORD = validator(
    record(
        {
            "step": integer(0, 10**9), "epoch": FLOAT, "metric": text(200), "value": FLOAT, "samples": integer(1, 10**9),
            "cfg_scale": FLOAT, "weights": one_of("ema", "student"), "against": text(5000), "key": text(100),
        },
        {"seconds": FLOAT, "time": text(100), "rollbacks": integer(0, 10**9)},
    )
)  # fmt: skip
_PROGRESS = validator(record({"step": integer(0, 10**9), "done": integer(0, 10**9), "samples": integer(1, 10**9)}))
PROTOCOL = (
    "metric",
    "samples",
    "cfg_scale",
    "weights",
)  # with labels and reference: scores that differ in one are not one curve
REFERENCE = ("sha256", "subset", "pictures")  # fields of ``reference`` that identify it; its path is not one of them
LABELS = {"data": "like the training shards", "balanced": "balanced"}  # eval.labels -> ``labels``


def append_evaluation(run: Path, found: Mapping[str, Any]) -> None:
    """Append one line, on the disk when this returns; none into a folder that another process has taken over. Raises
    ``OSError``."""
    if lease.held_elsewhere(run):
        return
    append_line(run / EVALUATIONS, json.dumps(dict(found)))


def read_evaluations(run: Path, until: int | None = None) -> list[Record]:
    """The newest score of each step, in the order of the steps, of the protocol of the newest line; damaged lines are
    skipped, and scores of weights that a rollback discarded. ``until``: leave out later steps, of which older versions did not
    record whether a rollback followed."""
    lines = [r for r in read_jsonl(run / EVALUATIONS, _RECORD, MAX_EVENTS) if math.isfinite(r["value"])]
    names = [r["to"] for r in read_rollbacks(run)] if lines else []
    targets = [step_in(Path(name)) if NAME.fullmatch(name) else math.inf for name in names]
    lines = [r for r in lines if not is_discarded(r, targets)]
    lines = [r for r in lines if until is None or r["step"] <= until]
    if not lines:
        return []
    newest = {r["step"]: r for r in lines if same_protocol(r, lines[-1])}
    return [newest[step] for step in sorted(newest)]


def is_discarded(found: Mapping[str, Any], targets: Sequence[float]) -> bool:
    """Whether a rollback after the score went back to an earlier step. ``targets``: the steps of all rollbacks, oldest first."""
    return "rollbacks" in found and any(step < found["step"] for step in targets[found["rollbacks"] :])


def same_protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two lines are scores of one curve. What one of them does not record is not compared; references without a hash
    are compared by ``against``."""
    if any(a.get(name) != b.get(name) for name in PROTOCOL):
        return False
    if "labels" in a and "labels" in b and a["labels"] != b["labels"]:
        return False
    first, second = _reference(a), _reference(b)
    if not (first and second):
        return bool(a.get("against") == b.get("against"))
    return all(first[name] == second[name] for name in REFERENCE if name in first and name in second)


def _reference(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """``reference`` of a line; empty if it records no hash."""
    reference = found.get("reference")
    return reference if isinstance(reference, Mapping) and isinstance(reference.get("sha256"), str) else {}


def describe_reference(found: Mapping[str, Any]) -> str:
    """``VIRTUAL_imagenet256_labeled.npz``; ``data/codes/train, 50000 images``; ``photos, subset test, 900 images``"""
    reference = _reference(found)
    subset, pictures = reference.get("subset"), reference.get("pictures")
    parts = [str(found.get("against", "a reference that is not recorded"))]
    parts += [f"subset {subset}"] if isinstance(subset, str) else []
    return ", ".join(parts + ([f"{pictures} images"] if isinstance(pictures, int) else []))


def find_evaluation(run: Path, step: int, key: str) -> Record | None:
    """The score of ``step`` with the same ``key``, if there is one."""
    lines = read_jsonl(run / EVALUATIONS, _RECORD, MAX_EVENTS)
    return next((r for r in reversed(lines) if r["step"] == step and r["key"] == key), None)


def epochs_to(found: Sequence[Record], thresholds: Sequence[float]) -> dict[float, float | None]:
    """Threshold -> the first evaluated epoch with a score at or below it, None if no score reaches it. Not interpolated."""
    return {k: next((r["epoch"] for r in found if r["value"] <= k), None) for k in thresholds}


def describe_epochs(found: Sequence[Record], thresholds: Sequence[float]) -> str:
    """``<= 50 at epoch 10; <= 20 not yet``"""
    reached = epochs_to(found, thresholds).items()
    return "; ".join(f"<= {k:g} {'not yet' if e is None else f'at epoch {e:.4g}'}" for k, e in reached)


def describe_evaluations(found: Sequence[Record], thresholds: Sequence[float], progress: Record | None) -> str:
    """The newest score, the best one, the epochs to the thresholds, and the evaluation under way, in a sentence each."""
    parts = []
    if found:
        last, best = found[-1], min(found, key=lambda r: float(r["value"]))
        what = f"{last['samples']} samples of the {last['weights']} weights, cfg_scale {last['cfg_scale']:g}"
        parts.append(f"{last['metric']} {last['value']:.4g} at step {last['step']}, epoch {last['epoch']:.4g} ({what})")
        if best is not last:
            parts.append(f"best {best['value']:.4g} at epoch {best['epoch']:.4g}")
        if thresholds:
            parts.append(describe_epochs(found, thresholds))
    if progress:
        parts.append(f"evaluating step {progress['step']}: {progress['done']} of {progress['samples']} images")
    return "\n".join(parts)


def read_progress(run: Path) -> Record | None:
    """The evaluation that is under way, or was when the run was killed."""
    found = read_jsonl(run / EVALUATING, _PROGRESS, 1 << 16)
    return found[0] if found else None
