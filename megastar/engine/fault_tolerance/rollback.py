"""Rollback: where skipping steps does not help, a run returns to its last good checkpoint and trains on other data.

RUN/rollbacks.jsonl has a line for each, on the disk before anything is removed: a job that is killed at any moment
restarts either before or after the rollback, and counts it in both cases.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastar.config.schema import FaultsConfig
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.errors import NonFiniteLoss
from megastar.engine.fault_tolerance.skip_policy import SkipPolicy, name_ranks
from megastar.engine.rank_sync import on_main, retry, run_on_main
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import time_and_job
from megastar.run_dir.jsonl import MAX_EVENTS, read_ends, read_jsonl
from megastar.run_dir.layout import METRICS, ROLLBACKS, SKIPPED
from megastar.run_dir.rollbacks import read_rollbacks
from megastar.utils.files import append_line, write_atomic
from megastar.utils.json_file import integer, list_of, record, text, validator

_PLACES = list_of(record({"rank": integer(), "host": text(1000)}))
_SKIPPED = validator(record({"step": integer(), "why": text()}, {"suspects": _PLACES, "hosts": integer()}))


@dataclass(frozen=True)
class RollbackPlan:
    """``record`` is the line of rollbacks.jsonl, ``number`` counts the run's rollbacks, this one included."""

    target: Path
    record: dict[str, Any]
    number: int
    text: str


def finish_rollback(run: Path, ctx: Context) -> list[dict[str, Any]]:
    """Complete a rollback that was interrupted after it was recorded. Returns the run's rollbacks, on all ranks."""

    def finish() -> list[dict[str, Any]]:
        records = read_rollbacks(run)
        if records:
            folder = checkpoint_dir.folder_of(run)
            newest, target = checkpoint_dir.latest(folder), folder / records[-1]["to"]
            if newest and rollbacks_before(newest) < len(records) and target in checkpoint_dir.complete(folder):
                discard_after(target)
        return records

    return run_on_main(ctx, finish)


def rollbacks_before(path: Path) -> int:
    """The number of rollbacks before a checkpoint was written."""
    rollbacks: int = checkpoint_dir.parse_manifest(path).get("guard", {}).get("rollbacks", 0)
    return rollbacks


def discard_after(target: Path) -> None:
    """Make ``target`` the newest checkpoint, and remove later ones."""
    write_atomic(target.parent / "latest", f"{target.name}\n".encode())
    for path in checkpoint_dir.complete(target.parent):
        if checkpoint_dir.step_in(path) > checkpoint_dir.step_in(target):
            checkpoint_dir.remove(path)


def choose_checkpoint(folder: Path, first: int) -> tuple[Path | None, str]:
    """The newest checkpoint from before step ``first``, the first of those skipped, that has no skipped step in its
    window; where there is none, the next best, and in what it falls short."""
    known = checkpoint_dir.complete(folder)
    before = [p for p in known if checkpoint_dir.step_in(p) <= first]
    good = [p for p in before if not checkpoint_dir.parse_manifest(p).get("guard", {}).get("skips")]
    for found, shortcoming in (
        (good, ""),
        (before, "which has skipped steps itself"),
        (known, "which was saved after the first of them"),
    ):
        if found:
            return found[-1], shortcoming
    return None, ""


def plan_rollback(run: Path, lr: float, ctx: Context, policy: SkipPolicy, step: int) -> RollbackPlan:
    """Choose the last good checkpoint, after the skipped ``step``; the data continues after this step's batch.

    A collective. Raises ``NonFiniteLoss`` with a diagnosis, which names ``lr``, when there is no checkpoint, or after
    ``faults.max_rollbacks``.
    """

    def choose() -> tuple[str, str, str]:
        target, shortcoming = choose_checkpoint(checkpoint_dir.folder_of(run), policy.skips[0])
        exhausted = policy.rollbacks >= policy.faults.max_rollbacks
        end = diagnosis(run, lr, policy, step, target) if exhausted or not target else ""
        return str(target), shortcoming, end

    chosen, shortcoming, end = run_on_main(ctx, choose)
    if end:
        raise NonFiniteLoss(end)
    target = Path(chosen)
    position, number = step + policy.offset + 1, policy.rollbacks + 1
    record = {**time_and_job(), "step": step, "to": target.name, "position": position, "skipped": policy.skips}
    text = (
        f"step {step}: {len(policy.skips)} steps were skipped within {policy.faults.spike_window}; rolled back to {target}"
        f"{', ' + shortcoming if shortcoming else ''}; the data continues after this step (rollback {number} of {policy.faults.max_rollbacks})"
    )
    return RollbackPlan(target, record, number, text)


def commit_rollback(run: Path, ctx: Context, plan: RollbackPlan, patience: float) -> None:
    """Record the rollback, then discard later checkpoints. A collective.

    Raises ``UserError`` where the record cannot be written within ``patience`` seconds.
    """

    def commit() -> None:
        if plan.record not in read_rollbacks(run):  # an earlier attempt may have written it
            append_line(run / ROLLBACKS, json.dumps(plan.record))
        discard_after(plan.target)

    if problem := retry(ctx, lambda: on_main(ctx, commit), patience):
        raise UserError(
            f"the rollback to {plan.target} could not be recorded in {run} ({problem}): free some disk space"
        )


def diagnosis(run: Path, lr: float, policy: SkipPolicy, step: int, target: Path | None) -> str:
    """What happened, the likely cause, what to do."""
    faults = policy.faults
    rows = read_jsonl(run / SKIPPED, _SKIPPED, MAX_EVENTS)
    recent = [r for r in rows if r["step"] in policy.skips][-len(policy.skips) :]
    losses = ", ".join(f"step {r['step']}: {r['why']}" for r in recent[-4:])
    why = (
        f"after {policy.rollbacks} rollbacks (faults.max_rollbacks {faults.max_rollbacks})"
        if target
        else "and there is no checkpoint to roll back to (train.save_every)"
    )
    with suppress(KeyError, IndexError):
        losses += f"; before, the loss was {recent[-1]['mean']:.5g} +- {recent[-1]['sigma']:.2g}"
    norms = [r["grad_norm"] for r in read_ends(run / METRICS, 0, 3) if "grad_norm" in r][-3:]
    if norms:
        losses += f", the last gradient norms {', '.join(str(n)[:6] for n in norms)}"
    return (
        f"step {step}: {len(policy.skips)} steps were skipped within {faults.spike_window} {why} ({losses}); "
        f"{advice(faults, lr, rows)}; {run / SKIPPED} names the batches"
        + (f", {target} is the last good checkpoint" if target else "")
    )


def advice(faults: FaultsConfig, lr: float, rows: list[dict[str, Any]]) -> str:
    """What the skipped steps of the whole run have in common."""
    broken = [r for r in rows if "not finite" in r["why"]]
    places = [{(s["rank"], s["host"]) for s in r.get("suspects", [])} for r in broken]
    hosts = [{host for _, host in place} for place in places]
    if hosts and (common := set.intersection(*hosts)):
        ranks = name_ranks({"rank": r, "host": h} for r, h in sorted(set.union(*places)) if h in common)
        remedy = "exclude this host" if broken[-1].get("hosts", 1) > 1 else "the GPU or its memory may be faulty"
        return f"every loss that was not finite came from {ranks}: {remedy}, see megastar doctor"
    if broken:
        return f"the losses that were not finite came from no single host: resume with a lower optim.lr (now {lr:g})"
    return (
        f"all were spikes: resume with a lower optim.lr (now {lr:g}), or a higher faults.spike_sigma (now "
        f"{faults.spike_sigma:g}) if such losses are normal for the data"
    )
