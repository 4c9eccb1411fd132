"""The training loop: ``Trainer`` holds one run on this rank, ``train`` is what `megastar train` calls on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.rng_state import seed_dropout
from megastar.config.load import as_run_config
from megastar.config.schema import RunConfig
from megastar.data.loader import TokenLoader
from megastar.data.order import VERSION as ORDER
from megastar.data.storage.store import is_remote
from megastar.data.token_order import schedule_change
from megastar.engine.checkpointer.async_saver import Saver, grace_period
from megastar.engine.checkpointer.initial_weights import check_initial, load_initial, open_initial
from megastar.engine.checkpointer.load import load_checkpoint
from megastar.engine.dry_run import describe
from megastar.engine.elastic.memory_checkpoint import MemoryCheckpoints
from megastar.engine.elastic.mesh_change import record_start
from megastar.engine.evaluation.checks import check_evaluation
from megastar.engine.evaluation.scheduled import ScheduledEvaluation
from megastar.engine.fault_tolerance import replica_checksum
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.engine.fault_tolerance.rollback import commit_rollback, finish_rollback, plan_rollback
from megastar.engine.fault_tolerance.skip_policy import NONFINITE_GRADIENT, SkipPolicy, StepRecord, record_skip
from megastar.engine.fault_tolerance.step_consensus import StepConsensus
from megastar.engine.fault_tolerance.stragglers import Stragglers
from megastar.engine.fault_tolerance.watchdog import watch
from megastar.engine.input_pipeline.batch_fetcher import BatchFetcher, OutOfData
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.engine.lr_schedule import peak_rate, rates_at, row_due, total_steps
from megastar.engine.memory_check import check_run
from megastar.engine.metrics.environment import command_line
from megastar.engine.metrics.health_monitor import HealthMonitor
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.step_metrics import ideal_seconds, step_metrics
from megastar.engine.metrics.trackers.tracker import public_config
from megastar.engine.phase import PHASE, SAVING, STARTING, VALIDATION
from megastar.engine.profiling.step_profiler import StepProfiler
from megastar.engine.rank_sync import on_all_ranks, run_on_main
from megastar.engine.resume_checks import check_resumed, check_start, claim_run_folder, first_checks
from megastar.engine.run_end import RunEnd
from megastar.engine.run_folder import hold_run_folder
from megastar.engine.teacher_pass import teacher_first
from megastar.engine.train_result import TrainResult
from megastar.engine.train_step import average_over_ranks, losses, set_schedules, validation_loss
from megastar.engine.zero.process_group import collective_timeout, set_timeouts, start
from megastar.engine.zero.setup import build
from megastar.run_dir import checkpoint_dir
from megastar.utils.signals import Preempted, StopFlag, status_after

logger = logging.getLogger(__name__)


def train(cfg: RunConfig, *, dry_run: bool = False, stop: StopFlag | None = None) -> None:
    """Train to the end, resuming from the run folder's newest checkpoint. Exits with 85 after a stop signal.

    ``stop``: a flag that has caught signals since the process began. Signal handlers are not restored.
    """
    flag = stop or StopFlag()
    trainer = Trainer(cfg, stop=flag, watchdog=True)
    if dry_run:
        flag.release()  # there is nothing to save
        trainer.dry_run()
    elif signal_number := trainer.fit().signal:
        flag.ignore()  # a further signal must not replace the exit status
        raise SystemExit(status_after(signal_number))


class Trainer(RunEnd):
    """One training run on this rank; constructed on every rank alike.

    Args:
        config: the run's configuration, the path of its YAML file, or a dict of its sections.
        stop: catches stop signals; without one, ``fit`` installs handlers where it runs in the main thread, and
            restores the former ones.
        watchdog: end the process when a rank hangs or is lost (``faults.hang_timeout``, ``faults.lost_timeout``). Off by
            default: a program that embeds the trainer is not ended by it.

    ``hooks`` are called with the step's record after each step: metrics, validation, saving, and what a caller appends.
    """

    def __init__(
        self,
        config: RunConfig | str | Path | Mapping[str, Any],
        *,
        stop: StopFlag | None = None,
        watchdog: bool = False,
    ):
        self.cfg, self.watchdog, self._stop = as_run_config(config), watchdog, stop
        self.run, self.checkpoints = Path(self.cfg.run), checkpoint_dir.folder_of(self.cfg.run)
        self.step = self.steps = 0  # done; in all
        self.hooks: list[Callable[[StepRecord], None]] = [self._log, self._validate, self._save]
        self.hooks += [self._evaluate, self._remember]

    # Set-up ------------------------------------------------------------------------------------------------------
    def fit(self) -> TrainResult:
        """Train to the end or to a stop signal, from the newest checkpoint of the run folder where there is one.

        Raises ``UserError`` for a configuration, data or a checkpoint that does not fit, ``NonFiniteLoss`` when skipping
        and rolling back do not help, ``CorruptReplica`` for ranks that disagree. Never ends the interpreter.
        """
        cfg = self.cfg
        first_checks(cfg)
        self.data = open_data(cfg)
        self.stop = self._stop or StopFlag()
        PHASE.reset()
        try:
            self.initial = open_initial(cfg)
            check_initial(self.initial, cfg, self.data)
            self.ctx = check_run(cfg, start(cfg, lambda: self.stop.signal))  # before the run folder exists
            run_on_main(self.ctx, lambda: check_evaluation(cfg, self.data))
            self._leave_if_stopped()
            with hold_run_folder(cfg, self.ctx, self.stop) as self.lease:
                self._leave_if_stopped()
                claim_run_folder(cfg, self.ctx, self.data)
                with watch(cfg, self.ctx.rank, self.ctx.world, self.ctx.secret) if self.watchdog else nullcontext():
                    self._build()
                    self._train()
        except Preempted as leaving:
            saver: Saver | None = getattr(self, "saver", None)  # none before the first step
            return TrainResult(self.step, saver.done if saver else None, leaving.signal)
        finally:
            self.data.close()
            if self._stop is None:
                self.stop.restore()
        return TrainResult(self.step, checkpoint_dir.latest(self.checkpoints))

    def dry_run(self) -> None:
        """Build everything, run steps on random tokens, and print memory, batch and schedule. Writes nothing."""
        cfg, shards = first_checks(self.cfg), self.cfg.data.shards
        with closing(open_data(cfg)) if is_remote(shards) or Path(shards).exists() else nullcontext() as data:
            check_initial(open_initial(cfg), cfg, data)
            ctx = check_run(cfg, start(cfg))
            run_on_main(ctx, lambda: check_evaluation(cfg, data))
            engines = build(cfg, ctx)
            check_start(cfg, ctx, engines, data, checkpoint_dir.latest(self.checkpoints))
            describe(cfg, ctx, engines, data)

    def _build(self) -> None:
        """Engines, and their state from the newest checkpoint, ``train.init`` or nothing."""
        cfg, ctx, manifest = self.cfg, self.ctx, self.data.train.manifest
        self.engines = build(cfg, ctx)
        set_timeouts(collective_timeout(cfg.faults, cfg.data))
        rollbacks = finish_rollback(self.run, ctx)
        self.policy = SkipPolicy(cfg.faults, len(rollbacks))
        # Views of a disk may differ.
        newest = run_on_main(ctx, lambda: str(checkpoint_dir.latest(self.checkpoints) or ""))
        self.memory = MemoryCheckpoints(cfg, ctx, self.engines)
        if found := self.memory.newest(Path(newest) if newest else None, len(rollbacks)):
            restored = load_checkpoint(ctx, self.engines, found, cfg.train.seed)
            self.step, origin = restored["step"], restored.get("init")
            self.policy.restore(restored, len(rollbacks), rollbacks[-1]["position"] if rollbacks else 0)
            changes = check_resumed(cfg, ctx, self.data, restored, found)
        else:
            changes = []
            self.step, origin = 0, load_initial(self.initial, cfg.train.init, ctx, self.engines)
            seed_dropout(cfg.train.seed, ctx.mesh.data_rank, 0)
        self.steps = total_steps(cfg.train, manifest.samples)
        planned = restored.get("steps", self.steps) if found else self.steps
        if ctx.main and (sentence := schedule_change(cfg, manifest.samples, self.step, planned)):
            logger.warning(sentence)
        self.found, self.first = found, self.step  # first: steps done at the start, or at the last rollback
        self.metadata: dict[str, Any] = {  # of each checkpoint
            "steps": self.steps,
            **self.data.record,
            "order": ORDER,
            "classes": manifest.classes,
            "samples": manifest.samples,
            "init": origin,
            "changes": changes,
            "command": command_line(),
        }

    def _train(self) -> None:
        """Open what a run that has steps left needs, run the loop, close it."""
        cfg, ctx = self.cfg, self.ctx
        self.evaluation = ScheduledEvaluation(cfg, ctx, self.engines, self.data, lambda: self.stop.signal)
        if self.step >= self.steps:
            if ctx.main:
                logger.info("%s is done: %d of %d steps; raise train.steps to continue", cfg.run, self.step, self.steps)
            if cfg.train.upload:
                Saver(cfg, ctx, self.engines, self.step, self.lease).repeat_upload()
            with ExitStack() as opened:  # an earlier start may have ended in the last evaluation
                if not self.evaluation.due(self.step, self.steps):
                    return
                self.metrics = on_all_ranks(ctx, lambda: self._open_metrics(opened))
                self._evaluate_again()
            return
        self._leave_if_stopped()
        with ExitStack() as opened:
            self.loader = on_all_ranks(ctx, lambda: opened.enter_context(closing(self._open_loader())))
            self.metrics = on_all_ranks(ctx, lambda: self._open_metrics(opened))
            opened.callback(self.memory.close)
            changes = self.metadata["changes"]
            record_start(
                self.metrics, cfg, ctx, self.engines, self.data.train.manifest, self.found, self.steps, changes
            )
            self.fetcher = BatchFetcher(self.loader, ctx, lambda: bool(self.stop.signal), self.run)
            self.saver = Saver(cfg, ctx, self.engines, self.step, self.lease)
            self.stragglers = Stragglers(ctx, self.engines, self.fetcher, cfg.faults.slow_ratio)
            if ctx.main and (shortfall := self.saver.disk_shortfall(self.steps)):
                self.metrics.event("warning", shortfall)
            micro_batch = self.engines.micro_batch
            self.validation = on_all_ranks(ctx, lambda: self.data.validation_batches(cfg, ctx, micro_batch))
            self.health = HealthMonitor(cfg, ctx.world, self.steps, self.metrics)
            self.profiler = StepProfiler(cfg.train.profile, ctx, self.run, self.metrics, self.steps)
            opened.callback(self.profiler.close)
            self.engines.student.train()
            self.skipped = 0  # steps since the last row
            try:
                self._evaluate_again()
                self._loop()
                self._finish()
            except OutOfData as error:
                self._stop_without_data(error.signal)
            except CorruptReplica:
                PHASE.at(SAVING)
                self.metrics.saved(self.saver.finish())  # the save under way is good
                raise

    def _open_loader(self) -> TokenLoader:
        mesh, position = self.ctx.mesh, self.step + self.policy.offset
        place = {"rank": mesh.data_rank, "world": mesh.data, "accumulation": self.engines.accumulation}
        device, online = self.ctx.device, self.data.online
        if online is not None:
            online.place(device)
        return TokenLoader(self.data.train, self.cfg, start_step=position, device=device, online=online, **place)

    def _open_metrics(self, opened: ExitStack) -> MetricsLogger:
        cfg, ctx = self.cfg, self.ctx
        metrics = MetricsLogger(
            self.run, self.step, self.steps, cfg.train.log_every, ctx.main, ideal_seconds(cfg, ctx),
            trackers=cfg.train.trackers, config=public_config(cfg),
        )  # fmt: skip
        opened.callback(metrics.close)  # at once: what follows, or another rank, may fail
        return metrics

    # The loop ----------------------------------------------------------------------------------------------------
    def _loop(self) -> None:
        """One turn is one optimizer step over its micro-batches."""
        engines = self.engines
        while self.step < self.steps:
            PHASE.begin(self.step + 1)
            self.profiler.begin(self.step)
            record = StepRecord()
            batches = self.fetcher.micro_batches(engines.accumulation)
            for batch in teacher_first(self.cfg, engines, self.ctx, batches, self.step, self.fetcher.timer):
                loss, metrics = self._forward(batch)
                consensus = self._ask_all_ranks(loss)  # its reduction overlaps with the backward pass
                PHASE.at("backward")
                engines.student.backward(loss)
                result = consensus.result()
                if result.save_failed:
                    self.saver.check_folder()
                if result.out_of_data:
                    raise OutOfData(result.signal)
                record.add(result, metrics, batch["ids"])
                if engines.student.is_gradient_accumulation_boundary():
                    self._before_update(record)
                PHASE.at("optimizer")
                if not engines.step(skip=bool(record.skip_reason)):
                    record.skip(NONFINITE_GRADIENT)
            if record.skip_reason:
                if self._skip(record):
                    self._roll_back()
                    continue
            else:
                self.policy.accept(record)
                PHASE.at("teacher")
                engines.refresh_teacher()
            self.step += 1
            PHASE.finish(self.step)
            self.metadata.pop("val_loss_ar", None)
            for hook in self.hooks:
                hook(record)
            self.profiler.end()

    def _forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        due = row_due(self.cfg.train, self.step, self.steps)
        found = losses(self.cfg, self.engines, self.ctx, batch, self.step, spreads=due)
        self.fetcher.timer.computed()
        return found

    def _ask_all_ranks(self, loss: Tensor) -> StepConsensus:
        PHASE.at("asking all ranks")
        return StepConsensus(self.ctx, loss, self.stop.signal, self.saver.failed, self.fetcher.out_of_data)

    def _before_update(self, record: StepRecord) -> None:
        """All gradients of the step are there: compare replicas, set the schedules, decide whether to skip."""
        cfg, saves = self.cfg, bool(record.signal) or record.save_failed or self.step + 1 == self.steps
        if replica_checksum.due(cfg.faults, cfg.train, self.step, saves=saves):
            PHASE.at("comparing checksums")
            drift = (self.step - self.saver.step) * peak_rate(cfg.optim, cfg.train.global_batch)
            replica_checksum.compare(self.run, self.engines, self.ctx, self.step, drift)
        set_schedules(cfg, self.engines, self.step, self.steps)
        record.skip(self.policy.reason_to_skip(record))

    def _skip(self, record: StepRecord) -> bool:
        """Record a skipped step; whether it is one too many."""
        self.skipped += 1
        PHASE.at("recording a skipped step")
        row, text = record_skip(self.ctx, self.run, self.policy, self.loader.shards, record, self.step)
        self.metrics.event("skipped", text, skipped=self.step, why=row["why"], suspects=row["suspects"])
        return self.policy.skip(self.step)

    def _roll_back(self) -> None:
        """Restore the last good checkpoint; the data continues after the skipped step's batch."""
        PHASE.at(SAVING)
        self.metrics.saved(self.saver.finish())
        PHASE.at(STARTING)  # a checkpoint is read
        plan = plan_rollback(self.run, self.cfg.optim.lr, self.ctx, self.policy, self.step)
        restored = load_checkpoint(self.ctx, self.engines, plan.target, self.cfg.train.seed)
        commit_rollback(self.run, self.ctx, plan, self.cfg.faults.save_patience)  # only now: the target is intact
        left, self.step = self.step, int(restored["step"])
        self.first, self.skipped = self.step, 0
        self.policy.restore(restored, plan.number, plan.record["position"])
        self.loader.load_state_dict({"samples": (self.step + self.policy.offset) * self.loader.global_batch})
        self.fetcher.restart()
        self.saver.rewind(plan.target, self.step)
        self.memory.discard()
        self.metrics.rewind(self.step, plan.target)
        self.metrics.event("rolled_back", plan.text, left=left, to=self.step, position=plan.record["position"])

    # Hooks -------------------------------------------------------------------------------------------------------
    def _log(self, record: StepRecord) -> None:
        row: dict[str, Any] = {}
        slow: list[tuple[str, dict[str, Any]]] = []  # events
        if row_due(self.cfg.train, self.step - 1, self.steps):
            PHASE.at("averaging the metrics")
            if not record.skip_reason:
                row = average_over_ranks(self.ctx, record.means()) | {"grad_norm": self.engines.grad_norm()}
            rates = rates_at(self.cfg.optim, self.cfg.train.global_batch, self.step - 1, self.steps)
            row |= step_metrics(self.ctx, self.engines) | rates
            waits, slow = self.stragglers.row(self.step - self.metrics.last_step)
            row |= waits | ({"skipped": self.skipped} if self.skipped else {})
            self.skipped = 0
        self.metrics.step(self.step, self.cfg.train.global_batch, row)
        self.health.update(self.step, row)
        self.metrics.warn(slow, "slow")

    def _validate(self, record: StepRecord) -> None:
        if self.validation and (self.step == self.steps or self.step % self.cfg.train.val_every == 0):
            PHASE.at(VALIDATION)
            if self.ctx.device.type == "cuda":
                torch.cuda.synchronize()  # the step's own time ends here
            with self.metrics.paused():
                value = validation_loss(self.engines, self.ctx, self.validation)
            self.metadata["val_loss_ar"] = value
            self.metrics.write(self.step, {"val_loss_ar": value})
            self.metrics.note(f"step {self.step}: validation next-token loss {value:.4f}")

    def _save(self, record: StepRecord) -> None:
        """Save if a save is due, and stop after a signal. Raises ``Preempted``."""
        self.metrics.saved(self.saver.done)
        PHASE.at(SAVING)
        last = self.step == self.steps
        again = record.save_failed and self.saver.retry_due()
        if last or record.signal or again or self.step % self.cfg.train.save_every == 0:
            with self.metrics.paused():
                self.metrics.saved(self.saver.finish())  # else the next save's result would take its place
                blocked = self.saver.save(self.step, self._checkpoint_metadata())
            self.metrics.write(self.step, {"save_blocked_s": blocked})
        self.metrics.warn(self.saver.take_events())
        if record.signal and not last:
            unsaved = self._save_with_retry(grace_period(record.signal))
            self.metrics.saved(self.saver.done)
            self._stop_for(record.signal, unsaved or f"saved {self.saver.done}")  # the next start completes uploads

    def _remember(self, record: StepRecord) -> None:
        with self.metrics.paused():
            blocked = self.memory.save(self.step, self._checkpoint_metadata())
        if blocked is not None:
            self.metrics.write(self.step, {"memory_blocked_s": blocked})
