"""Going back: where skipping steps did not help, the run returns to its last good checkpoint and trains on other data.

RUN/rollbacks.jsonl has a line for each, on the disk before anything is removed: a job that is killed at any moment comes
up behind the roll-back, or before it, and counts it in either case.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.config.schema import RunConfig
from megastar.data.loader import TokenLoader
from megastar.engine.checkpointer import load
from megastar.engine.checkpointer.async_saver import Saver
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.errors import NonFiniteLoss
from megastar.engine.fault_tolerance.skip_policy import SkipPolicy, read_skips, said, stamp
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.phase import PHASE, SAVING, STARTING
from megastar.engine.rank_sync import on_main_with_retry, run_on_main
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.jsonl import read_ends, read_jsonl
from megastar.run_dir.layout import ROLLBACKS, SKIPPED
from megastar.utils.files import append_line, write_atomic


def read_records(run: Path) -> list[dict[str, Any]]:
    """The run's roll-backs, oldest first: ``step`` it left, checkpoint ``to``, ``position`` in the data it goes on at."""
    return [r for r in read_jsonl(run / ROLLBACKS) if {"step", "to", "position"} <= r.keys()]


def settle(cfg: RunConfig, ctx: Context) -> list[dict[str, Any]]:
    """Finish a roll-back that was cut off after it went on record. Returns the run's roll-backs, on all ranks."""

    def finish() -> list[dict[str, Any]]:
        records = read_records(Path(cfg.run))
        if records:
            folder = checkpoint_dir.folder_of(cfg)
            newest, target = checkpoint_dir.latest(folder), folder / records[-1]["to"]
            if newest and knows(newest) < len(records) and target in checkpoint_dir.complete(folder):
                forget_after(target)
        return records

    return run_on_main(ctx, finish)


def knows(path: Path) -> int:
    """How many roll-backs a checkpoint was written after."""
    number: int = checkpoint_dir.parse_manifest(path).get("guard", {}).get("rollbacks", 0)
    return number


def forget_after(target: Path) -> None:
    """Make ``target`` the newest checkpoint: later ones are of the way that was left."""
    write_atomic(target.parent / "latest", f"{target.name}\n".encode())
    for path in checkpoint_dir.complete(target.parent):
        if checkpoint_dir.step_in(path) > checkpoint_dir.step_in(target):
            checkpoint_dir.remove(path)


def choose(folder: Path, first: int) -> tuple[Path | None, str]:
    """The newest checkpoint from before step ``first``, the first of those skipped, that has no skipped step in its
    window; where there is none any more, what comes nearest to that, and a word of it."""
    known = checkpoint_dir.complete(folder)
    before = [p for p in known if checkpoint_dir.step_in(p) <= first]
    good = [p for p in before if not checkpoint_dir.parse_manifest(p).get("guard", {}).get("skips")]
    for found, word in (
        (good, ""),
        (before, "which has skipped steps itself"),
        (known, "which was saved after the first of them"),
    ):
        if found:
            return found[-1], word
    return None, ""


def roll_back(
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    loader: TokenLoader,
    metrics: MetricsLogger,
    saver: Saver,
    guard: SkipPolicy,
    step: int,
) -> int:
    """Put all ranks back to the last good checkpoint, after the skipped ``step``; returns the steps done there. The data
    goes on behind this step's batch.

    Raises ``NonFiniteLoss`` with a diagnosis when there is no checkpoint, or after ``faults.max_rollbacks``.
    """
    PHASE.at(SAVING)
    saver.finish()
    metrics.saved(saver.done)
    PHASE.at(STARTING)  # a checkpoint is read
    run, folder, first = Path(cfg.run), checkpoint_dir.folder_of(cfg), guard.skips[0]

    def plan() -> tuple[Path | None, str, str]:
        target, word = choose(folder, first)
        gone = guard.rollbacks >= cfg.faults.max_rollbacks
        return target, word, diagnosis(cfg, guard, step, target) if gone or not target else ""

    target, word, end = run_on_main(ctx, plan)
    if end:
        raise NonFiniteLoss(end)
    assert target is not None
    about = load.load(cfg, ctx, engines, target)  # it is whole: only now may the way from it be left
    record = {**stamp(), "step": step, "to": target.name, "position": step + guard.offset + 1, "skipped": guard.skips}

    def commit() -> None:
        if record not in read_records(run):  # a try before this one may have come so far
            append_line(run / ROLLBACKS, json.dumps(record))
        forget_after(target)

    if problem := on_main_with_retry(ctx, commit, cfg.faults.save_patience):
        raise UserError(f"the roll-back to {target} could not be put on record in {run} ({problem}): free some space")
    number, done = guard.rollbacks + 1, int(about["step"])
    guard.restore(about, number, record["position"])
    loader.load_state_dict({"samples": (done + guard.offset) * loader.global_batch})
    saver.done, saver.step = target, done
    if saver.uploader:
        saver.uploader.put(target)  # the newest there too
    metrics.rewind(done, target)
    text = (
        f"step {step}: {len(record['skipped'])} steps were skipped within {cfg.faults.spike_window}; back to {target}"
        f"{', ' + word if word else ''}; the data goes on behind this step (roll-back {number} of {cfg.faults.max_rollbacks})"
    )
    metrics.event("rolled_back", text, left=step, to=done, position=record["position"])
    return done


def diagnosis(cfg: RunConfig, guard: SkipPolicy, step: int, target: Path | None) -> str:
    """One sentence a question: what happened, whose fault it looks like, what to do."""
    run, faults = Path(cfg.run), cfg.faults
    rows = read_skips(run)
    recent = [r for r in rows if r["step"] in guard.skips][-len(guard.skips) :]
    losses = ", ".join(f"step {r['step']}: {r['why']}" for r in recent[-4:])
    why = (
        f"after {guard.rollbacks} roll-backs (faults.max_rollbacks {faults.max_rollbacks})"
        if target
        else "and there is no checkpoint to go back to (train.save_every)"
    )
    with suppress(KeyError, IndexError):
        losses += f"; before, the loss was {recent[-1]['mean']:.5g} +- {recent[-1]['sigma']:.2g}"
    norms = [r["grad_norm"] for r in read_ends(run / "metrics.jsonl", 0, 3) if "grad_norm" in r][-3:]
    if norms:
        losses += f", the last gradient norms {', '.join(str(n)[:6] for n in norms)}"
    return (
        f"step {step}: {len(guard.skips)} steps were skipped within {faults.spike_window} {why} ({losses}); "
        f"{advice(cfg, rows)}; {run / SKIPPED} names the batches"
        + (f", {target} is the last good checkpoint" if target else "")
    )


def advice(cfg: RunConfig, rows: list[dict[str, Any]]) -> str:
    """What the skipped steps of the whole run have in common."""
    broken = [r for r in rows if "not finite" in r["why"]]
    places = [{(s["rank"], s["host"]) for s in r.get("suspects", [])} for r in broken]
    hosts = [{host for _, host in place} for place in places]
    if hosts and (common := set.intersection(*hosts)):
        ranks = said({"rank": r, "host": h} for r, h in sorted(set.union(*places)) if h in common)
        remedy = "exclude that host" if broken[-1].get("hosts", 1) > 1 else "that GPU or its memory may be bad"
        return f"every loss that was not finite came from {ranks}: {remedy}, see megastar doctor"
    if broken:
        return f"the losses that were not finite came from no host alone: resume with a lower optim.lr (now {cfg.optim.lr:g})"
    return (
        f"all were spikes: resume with a lower optim.lr (now {cfg.optim.lr:g}), or a higher faults.spike_sigma (now "
        f"{cfg.faults.spike_sigma:g}) if such losses are in the nature of the data"
    )
