"""The training loop. ``train`` is what `megastar train` calls on every rank."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from megastar.checkpoint.rng_state import seed_dropout
from megastar.config.load import diff_configs, load_config, resolve_batch, save_config
from megastar.config.schema import RunConfig
from megastar.data.loader import TokenLoader
from megastar.data.order import VERSION as ORDER
from megastar.data.shards.manifest import Manifest
from megastar.data.storage.protocol import is_remote
from megastar.engine.checkpointer import load
from megastar.engine.checkpointer.async_saver import Saver, grace
from megastar.engine.context import Context
from megastar.engine.exit_codes import PREEMPTED
from megastar.engine.fault_tolerance import replica_checksum
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.engine.fault_tolerance.rollback import roll_back, settle
from megastar.engine.fault_tolerance.skip_policy import NONFINITE_GRADIENT, SkipPolicy, StepRecord, record_skip
from megastar.engine.fault_tolerance.step_consensus import StepConsensus, stop_asked
from megastar.engine.fault_tolerance.stragglers import Stragglers
from megastar.engine.fault_tolerance.watchdog import watch
from megastar.engine.input_pipeline.batch_fetcher import BatchFetcher, OutOfData
from megastar.engine.input_pipeline.data_checks import (
    check_same_data,
    check_same_order,
    digest_of,
    make_loader,
    make_validation,
    open_data,
)
from megastar.engine.lr_schedule import learning_rate, row_due, total_steps
from megastar.engine.metrics.environment import process_environment
from megastar.engine.metrics.health_monitor import HealthMonitor
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.step_metrics import ideal_seconds, step_metrics
from megastar.engine.phase import ENDING, PHASE, SAVING, VALIDATION
from megastar.engine.rank_sync import on_all_ranks
from megastar.engine.train_step import average_over_ranks, losses, set_schedules, validation_loss
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.setup import build, collective_timeout, set_timeouts, start
from megastar.errors import UserError
from megastar.model.io import read_model_metadata
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import append_event
from megastar.utils.signals import StopFlag


def train(cfg: RunConfig, *, dry_run: bool = False, stop: StopFlag | None = None) -> None:
    """Train to the end, resuming from the run folder's newest checkpoint. Exits with 85 when a signal asked to stop.

    ``stop``: one that has been listening since the process began.
    """
    there = is_remote(cfg.data.shards) or Path(cfg.data.shards).exists()
    manifest, validation = open_data(cfg) if not dry_run or there else (None, None)
    if cfg.train.init and not checkpoint_dir.latest(checkpoint_dir.folder_of(cfg)):
        read_model_metadata(cfg.train.init)  # it exists, before anything is built
    stop = stop or StopFlag()
    ctx = start(cfg)
    if signal_number := stop_asked(ctx, stop.signal):
        leave_unstarted(cfg, ctx, signal_number)
    resolve_batch(cfg, ctx.world)  # before the run folder exists
    if not dry_run:
        claim_run_folder(cfg, ctx)
    with nullcontext() if dry_run else watch(cfg, ctx.rank, ctx.world):
        build_and_run(cfg, ctx, manifest, validation, stop, dry_run)


def build_and_run(
    cfg: RunConfig,
    ctx: Context,
    manifest: Manifest | None,
    validation: Manifest | None,
    stop: StopFlag,
    dry_run: bool,
) -> None:
    """Engines, the newest checkpoint, data and metrics, then the loop."""
    engines = build(cfg, ctx)
    set_timeouts(collective_timeout(cfg))
    if dry_run:
        from megastar.engine.dry_run import describe

        describe(cfg, ctx, engines, manifest)
        return
    assert manifest is not None
    records = settle(cfg, ctx)
    guard = SkipPolicy(cfg.faults, len(records))
    found = load.newest(ctx, checkpoint_dir.folder_of(cfg))
    done, data = 0, {"data": digest_of(manifest), "val_data": digest_of(validation)}
    if found:
        restored = load.load(cfg, ctx, engines, found)
        done, origin = restored["step"], restored.get("init")
        guard.restore(restored, len(records), records[-1]["position"] if records else 0)
        check_same_data(cfg, restored, data, found)
        check_same_order(cfg, manifest, restored, found)
    else:
        origin = load.load_initial(cfg, ctx, engines) if cfg.train.init else None
        seed_dropout(cfg.train.seed, ctx.mesh.data_rank, 0)
    steps = total_steps(cfg, manifest.samples)
    if done >= steps:
        if ctx.main:
            Console().print(f"{cfg.run} is done: {done} of {steps} steps; raise train.steps to go on")
        return
    if signal_number := stop_asked(ctx, stop.signal):
        leave_unstarted(cfg, ctx, signal_number)
    loader = on_all_ranks(ctx, lambda: make_loader(cfg, ctx, engines, done + guard.offset))
    metrics = on_all_ranks(
        ctx,
        lambda: MetricsLogger(Path(cfg.run), done, steps, cfg.train.log_every, ctx.main, ideal_seconds(cfg, ctx)),
    )
    text = f"resumed {found} at step {done}" if found else f"{cfg.run}: {steps} steps on {ctx.world} rank(s)"
    metrics.event(
        "resumed" if found else "started", text, steps=steps, ranks=ctx.world, **process_environment(ctx.device)
    )
    if not manifest.tokenizer_sha256:
        metrics.note(f"{cfg.data.shards} does not say which tokenizer made it: that it fits is taken on trust")
    about = {
        "steps": steps,
        **data,
        "order": ORDER,
        "classes": manifest.classes,
        "init": origin,
        "command": " ".join(["megastar", *sys.argv[1:]]),
        "guard": guard.state(done),
    }
    try:
        run(cfg, ctx, engines, loader, metrics, guard, done, about, stop)
    finally:
        loader.close()
        metrics.close()


def leave_unstarted(cfg: RunConfig, ctx: Context, signal_number: int) -> NoReturn:
    """Before the first step there is nothing to save. Called by all ranks alike."""
    if ctx.main:
        found = checkpoint_dir.latest(checkpoint_dir.folder_of(cfg))
        text = f"signal {signal_number} before the first step: nothing to save; the same command starts again"
        append_event(Path(cfg.run), "signal", checkpoint_dir.step_in(found) if found else 0, text)
        Console().print(text)
    raise SystemExit(PREEMPTED)


def run(
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    loader: TokenLoader,
    metrics: MetricsLogger,
    guard: SkipPolicy,
    done: int,
    about: dict[str, Any],
    stop: StopFlag,
) -> None:
    """The loop itself: batch -> losses -> backward -> agree -> step -> teacher. ``about`` goes into each checkpoint.

    ``done`` steps lie before it, from where it started or last went back to."""
    supply, steps = BatchFetcher(loader, ctx, lambda: bool(stop.signal), Path(cfg.run)), about["steps"]
    saver = Saver(cfg, ctx, engines)
    stragglers = Stragglers(ctx, engines, supply, cfg.faults.slow_ratio)
    if ctx.main and (little := saver.lacks(steps)):
        metrics.event("warning", little)
    validation = on_all_ranks(ctx, lambda: make_validation(cfg, ctx, engines))
    health = HealthMonitor(cfg, ctx.world, steps, metrics)
    engines.student.train()
    saver.step = step = done
    skipped = 0  # steps since the last row
    while step < steps:
        PHASE.begin(step + 1)
        try:
            seen, why = train_step(cfg, ctx, engines, saver, supply, guard, stop, step, steps)
        except CorruptReplica:
            PHASE.at(SAVING)
            metrics.saved(saver.finish())  # the save under way is good
            raise
        except OutOfData as starved:
            leave(saver, supply, metrics, about, done, step, starved.signal)
        if why:
            skipped += 1
            PHASE.at("recording a skipped step")
            record_skip(ctx, metrics, guard, loader.shards, seen, step, why)
            if guard.skip(step):
                step = done = roll_back(cfg, ctx, engines, loader, metrics, saver, guard, step)
                supply.restart()
                skipped = 0
                continue
        PHASE.done = step = step + 1
        about["guard"] = guard.state(step)
        about.pop("val_loss_ar", None)
        last, row = step == steps, {}
        if row_due(cfg, step - 1, steps):
            PHASE.at("averaging the metrics")
            if not why:
                row = average_over_ranks(ctx, seen.sums()) | {"grad_norm": engines.grad_norm()}
            row |= step_metrics(ctx, engines) | {"lr": learning_rate(cfg, step - 1, steps)}
            row |= stragglers.row(step - metrics.last_step) | ({"skipped": skipped} if skipped else {})
            skipped = 0
        metrics.step(step, cfg.train.global_batch, row)
        health.update(step, row)
        metrics.warn(stragglers.news(), "slow")
        metrics.saved(saver.done)
        if validation and (last or step % cfg.train.val_every == 0):
            PHASE.at(VALIDATION)
            about["val_loss_ar"] = value = validation_loss(cfg, engines, ctx, validation)
            metrics.write(step, {"val_loss_ar": value})
            metrics.note(f"step {step}: validation next-token loss {value:.4f}")
        PHASE.at(SAVING)
        again = seen.lost and saver.attend()
        if last or seen.signal or again or step % cfg.train.save_every == 0:
            metrics.write(step, {"save_blocked_s": saver.save(step, about)})
        metrics.warn(saver.news())
        if seen.signal and not last:
            unsaved = saver.insist(step, about, grace(seen.signal))
            metrics.saved(saver.done)
            metrics.event(
                "signal", f"signal {seen.signal}: {unsaved or f'saved {saver.done}'}; the same command resumes"
            )
            raise SystemExit(PREEMPTED)  # the next run's uploads catch up
    if problem := saver.insist(steps, about, cfg.faults.save_patience, lambda: bool(stop.signal)):
        if signal_number := stop_asked(ctx, stop.signal):
            metrics.event("signal", f"signal {signal_number}: {problem}; the same command resumes")
            raise SystemExit(PREEMPTED)
        raise UserError(f"{problem}, and run the same command again")
    PHASE.at(ENDING)
    if problem := saver.close():
        metrics.event("warning", problem, situation="upload")
    metrics.saved(saver.done)
    metrics.warn(saver.news())
    metrics.event("finished", f"{steps} steps are done", note=False)


def train_step(
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    saver: Saver,
    supply: BatchFetcher,
    guard: SkipPolicy,
    stop: StopFlag,
    step: int,
    steps: int,
) -> tuple[StepRecord, str]:
    """One optimizer step over its micro-batches: what was seen of them, and why the step was skipped, if it was."""
    seen, why = StepRecord(), ""
    supply.begin_step()
    for _ in range(engines.accumulation):
        batch = supply.next()
        loss, parts = losses(cfg, engines, ctx, batch, step, spreads=row_due(cfg, step, steps))
        supply.computed()
        PHASE.at("asking all ranks")
        question = StepConsensus(ctx, loss, stop.signal, saver.failed, supply.dry)
        PHASE.at("backward")
        engines.student.backward(loss)
        word = question.answer()
        if word.dry:
            raise OutOfData(word.signal)
        seen.add(word, parts, batch["ids"])
        if engines.student.is_gradient_accumulation_boundary():
            if replica_checksum.due(cfg, step, saves=bool(seen.signal) or seen.lost or step + 1 == steps):
                PHASE.at("comparing checksums")
                replica_checksum.compare(cfg, engines, ctx, step, step - saver.step)
            set_schedules(cfg, engines, step, steps)
            why = guard.judge(seen)
        PHASE.at("optimizer")
        if not engines.step(skip=bool(why)):
            why = why or NONFINITE_GRADIENT
    if not why:
        guard.accept(seen)
        PHASE.at("teacher")
        engines.refresh_teacher()
    return seen, why


# The run folder ----------------------------------------------------------------------------------------------------
RESUMABLE = (
    "model.name",
    "attention.",
    "data.shards",  # the same shards in another place: the checkpoint's digests tell
    "data.val_shards",
    "data.cache",
    "data.patience",
    "faults.",
    "optim.lr",  # what a loss that is not finite asks for
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.val_every",
    "train.save_every",
    "train.keep",
    "train.threads",
    "train.compile",
    "train.fused_ops",
    "train.upload",
    "train.micro_batch",
    "parallel.",
)


def claim_run_folder(cfg: RunConfig, ctx: Context) -> None:
    """Write config.yaml, or compare with the one there. Raises ``UserError`` naming the differing fields.

    Only length, the split over ranks and housekeeping may differ when a run is resumed.
    """
    path = Path(cfg.run) / "config.yaml"
    problem = ""
    if path.is_file():
        differing = [d for d in diff_configs(load_config(path), cfg) if not d.startswith(RESUMABLE)]
        if differing:
            problem = f"{cfg.run} holds a run of another configuration: {'; '.join(differing)}: choose another run=... or restore the fields"
    if problem:
        raise UserError(problem)
    if ctx.main and not (path.is_file() and not diff_configs(load_config(path), cfg)):  # a full disk needs no new one
        save_config(cfg, path)


def leave(
    saver: Saver,
    supply: BatchFetcher,
    metrics: MetricsLogger,
    about: dict[str, Any],
    start: int,
    step: int,
    signal_number: int,
) -> NoReturn:
    """End the run behind its last whole step, ``step`` steps done: a batch of the next one cannot be had.

    It is saved unless it was, or unless nothing was done since the ``start``. Called by all ranks alike.
    """
    PHASE.at(SAVING)
    problem = supply.why()
    supply.rewind()
    unsaved = saver.insist(step, about, grace(signal_number)) if step > start else ""
    place = saver.finish()
    metrics.warn(saver.news())
    kept = unsaved or (f"saved {place}" if place else "nothing was done since the start")
    if signal_number:
        metrics.saved(place)
        metrics.event("signal", f"signal {signal_number} while waiting for data: {kept}; the same command resumes")
        raise SystemExit(PREEMPTED)
    assert problem is not None
    metrics.saved(place)
    metrics.note(f"no batch for step {step + 1}: {kept}")
    raise problem
