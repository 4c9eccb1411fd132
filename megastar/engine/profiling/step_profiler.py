"""Records some steps of a run with torch.profiler, and writes RUN/profile."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from megastar.config.schema import ProfileConfig
from megastar.engine.context import Context
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.phase import PHASE, SAVING
from megastar.engine.profiling.summary import RANGE, summary_of
from megastar.run_dir.profiles import profile_files, table_text
from megastar.utils.files import atomic_file, make_folder, write_atomic, write_json

logger = logging.getLogger(__name__)
MOST_BLOCKS = 100_000  # allocations and releases in a memory snapshot


class StepProfiler:
    """``begin`` before each step and ``end`` after it. One step before the profiled ones, where there is one, is a warm-up
    of the profiler. It reads no tensor and draws no random number: the losses do not change.

    A profile that cannot be written is a warning; the run continues.
    """

    def __init__(self, cfg: ProfileConfig, ctx: Context, run: Path, metrics: MetricsLogger, steps: int):
        self.cfg, self.ctx, self.run, self.metrics = cfg, ctx, run, metrics
        self._mine = cfg.steps > 0 and ctx.rank in cfg.ranks
        self._profile: profile | None = None
        self._range: record_function | None = None
        self._summary: dict[str, Any] | None = None
        if cfg.steps and cfg.start + cfg.steps > steps and ctx.main:
            metrics.event(
                "warning",
                f"train.profile: the steps {cfg.start + 1} to {cfg.start + cfg.steps} are not all within the {steps} steps of "
                "this run: nothing is profiled",
            )
            self._mine = False

    def begin(self, done: int) -> None:
        """``done``: finished steps."""
        warmup = min(1, self.cfg.start)
        if not self._mine or self._profile is not None or done not in (self.cfg.start, self.cfg.start - warmup):
            return
        self._left = self.cfg.start - done + self.cfg.steps  # steps to record, the warm-up included
        plan = schedule(wait=0, warmup=self._left - self.cfg.steps, active=self.cfg.steps, repeat=1)
        activities = [ProfilerActivity.CPU]
        if self.ctx.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_BLOCKS)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()
        PHASE.listener = self._phase
        self._since = time.perf_counter()

    def end(self) -> None:
        """A step is done; after the last one the files are written."""
        if self._profile is None or not self._mine:
            return
        self._left -= 1
        self._close_range()
        self._seconds = time.perf_counter() - self._since
        if self._left:
            self._profile.step()
            if self._left == self.cfg.steps:  # the warm-up is over, and the recording has started
                self._since = time.perf_counter()
            return
        PHASE.listener = None
        PHASE.at(SAVING)  # takes seconds for each step
        with self.metrics.paused():
            try:
                self._profile.step()  # calls _write
            finally:
                self.close()

    def close(self) -> None:
        """Stop recording."""
        self._close_range()
        self._mine, PHASE.listener = False, None
        if self._profile is not None:
            self._profile.on_trace_ready = None  # incomplete profiles are not written
            self._profile.stop()
            self._profile = None
            if self.ctx.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _phase(self, phase: str) -> None:
        """The trace and the table name the phases of a step."""
        self._close_range()
        self._range = record_function(RANGE + phase)
        self._range.__enter__()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _write(self, recorded: Any) -> None:
        ctx, first = self.ctx, self.cfg.start + 1
        files = profile_files(self.run, ctx.rank, first, self.cfg.start + self.cfg.steps)
        try:
            make_folder(files.summary.parent)
            facts = {
                "rank": ctx.rank, "ranks": ctx.world, "device": device_name(ctx.device), "torch": torch.__version__,
                "first": first, "steps": self.cfg.steps, "seconds": self._seconds, "trace": files.trace.name,
            }  # fmt: skip
            if ctx.device.type == "cuda":
                with atomic_file(files.memory) as path:
                    torch.cuda.memory._dump_snapshot(str(path))
                facts["memory"] = files.memory.name
            with atomic_file(files.trace) as path:
                compressed = path.with_name(f"{path.name}.gz")  # torch compresses by the suffix
                recorded.export_chrome_trace(str(compressed))
                compressed.replace(path)
            summary = facts | summary_of(recorded, self.cfg.steps, ctx.device)
            write_json(files.summary, summary)
            write_atomic(files.table, table_text(summary).encode())
        except Exception as error:
            text = f"the profile of rank {ctx.rank} could not be written ({' '.join(str(error).split())[:300]})"
            if ctx.main:
                self.metrics.event("warning", text)
            else:
                logger.warning(text)
            return
        if ctx.main:
            self.metrics.note(
                f"profile of the steps {first} to {first + self.cfg.steps - 1}: megastar profile {self.run}"
            )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
