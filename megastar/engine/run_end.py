"""How a run ends: the last checkpoint, a stop signal, data that stay away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megastar.config.schema import RunConfig
from megastar.engine.checkpointer.async_saver import Saver, grace_period
from megastar.engine.context import Context
from megastar.engine.evaluation.scheduled import ScheduledEvaluation
from megastar.engine.fault_tolerance.skip_policy import SkipPolicy, StepRecord
from megastar.engine.fault_tolerance.step_consensus import any_stop_signal
from megastar.engine.input_pipeline.batch_fetcher import BatchFetcher
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.phase import ENDING, PHASE, SAVING
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import append_event
from megastar.run_dir.lease import in_use
from megastar.utils.signals import Preempted, StopFlag

logger = logging.getLogger(__name__)


class RunEnd:
    """The part of ``Trainer`` that ends a run."""

    cfg: RunConfig
    ctx: Context
    run: Path
    checkpoints: Path
    stop: StopFlag
    step: int
    steps: int
    first: int
    policy: SkipPolicy
    saver: Saver
    fetcher: BatchFetcher
    metrics: MetricsLogger
    metadata: dict[str, Any]
    evaluation: ScheduledEvaluation

    def _finish(self) -> None:
        """The last checkpoint is on the disk and uploaded, or the run fails."""
        if problem := self._save_with_retry(self.cfg.faults.save_patience, lambda: bool(self.stop.signal)):
            if signal_number := any_stop_signal(self.ctx, self.stop.signal):
                self._stop_for(signal_number, problem)
            raise UserError(f"{problem}, and run the same command again")
        PHASE.at(ENDING)
        if problem := self.saver.close():
            self.metrics.event("warning", problem, situation="upload", note=False)
        self.metrics.saved(self.saver.done)
        self.metrics.warn(self.saver.take_events())
        text = f"{self.steps} steps are done{problem and '; '}{problem}"
        self.metrics.event("finished", text, note=False, **self._cpu())
        if problem:
            self.metrics.note(text, logging.WARNING)

    def _stop_without_data(self, signal_number: int) -> None:
        """Some rank has no batch for the next step: save the last whole step and stop. Called by all ranks alike."""
        PHASE.at(SAVING)
        error = self.fetcher.error_of_any_rank()
        self.fetcher.restore_rng()
        unsaved = self._save_with_retry(grace_period(signal_number)) if self.step > self.first else ""
        place = self.saver.finish()
        self.metrics.warn(self.saver.take_events())
        self.metrics.saved(place)
        kept = unsaved or (f"saved {place}" if place else "no step was done since the start")
        if signal_number:
            self._stop_for(signal_number, kept, " while waiting for data")
        assert error is not None
        self.metrics.note(f"no batch for step {self.step + 1}: {kept}", logging.WARNING)
        raise error

    def _cpu(self) -> dict[str, Any]:
        """CPU seconds per step, for the event of the run's end; empty where this start has no row of steps."""
        return {} if self.metrics.step_cpu_s is None else {"step_cpu_s": round(self.metrics.step_cpu_s, 6)}

    def _stop_for(self, signal_number: int, kept: str, when: str = "") -> None:
        cpu = self._cpu() if self.step == self.steps else {}  # no later start has steps to measure
        self.metrics.event("signal", f"signal {signal_number}{when}: {kept}; the same command resumes", **cpu)
        raise Preempted(signal_number)

    def _evaluate(self, record: StepRecord) -> None:
        """The hook of the scheduled evaluations. Raises ``Preempted`` after a stop signal, with the step saved."""
        if self.evaluation.due(self.step, self.steps) and (number := self.evaluation.evaluate(self.step, self.metrics)):
            PHASE.at(SAVING)
            unsaved = self._save_with_retry(grace_period(number))
            self.metrics.saved(self.saver.done)
            self._stop_for(number, unsaved or f"saved {self.saver.done}", " in an evaluation")

    def _evaluate_again(self) -> None:
        """At a start: the evaluation of the checkpoint's step, if it was due and was not finished."""
        if self.evaluation.due(self.step, self.steps) and (number := self.evaluation.evaluate(self.step, self.metrics)):
            self._stop_for(number, f"step {self.step} is saved", " in an evaluation")

    def _leave_if_stopped(self) -> None:
        """Before the first step there is nothing to save. Called by all ranks alike."""
        if not (signal_number := any_stop_signal(self.ctx, self.stop.signal)):
            return
        if self.ctx.main:
            found = checkpoint_dir.latest(self.checkpoints)
            text = f"signal {signal_number} before the first step: nothing to save; the same command starts again"
            if not in_use(self.run):
                append_event(self.run, "signal", checkpoint_dir.step_in(found) if found else 0, text)
            logger.warning(text)
        raise Preempted(signal_number)

    def _checkpoint_metadata(self) -> dict[str, Any]:
        return self.metadata | {"guard": self.policy.state(self.step)}

    def _save_with_retry(self, patience: float, stop: Callable[[], bool] = lambda: False) -> str:
        return self.saver.save_with_retry(self.step, self._checkpoint_metadata(), patience, stop)
