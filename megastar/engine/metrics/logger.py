"""The metrics of a run: metrics.jsonl, events.jsonl, trackers such as TensorBoard, a progress bar. Main rank only."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megastar.engine.metrics.trackers.sinks import Trackers
from megastar.engine.metrics.trackers.tracker import QUIET_KINDS, TrackedRun
from megastar.run_dir.events import append_event, flush_events
from megastar.run_dir.jsonl import JsonlWriter
from megastar.run_dir.layout import METRICS
from megastar.utils.logs import shared_console
from megastar.utils.progress_bar import LOG_EVERY, progress_bar, time_left
from megastar.utils.redact import redact

logger = logging.getLogger(__name__)
SHOWN = {
    "loss": "loss", "loss_ar": "ar", "acc_step": "acc_step", "acc_view": "acc_view", "l2": "l2",
    "images_per_s": "images/s",
}  # fmt: skip


class MetricsLogger:
    """``step`` after each optimizer step; a row is written every ``every`` steps and at the end.

    A resumed run cuts rows after its checkpoint, so that metrics.jsonl holds each step once. Rows that cannot be written
    are buffered in memory; a tracker that fails is switched off. ``ideal``: seconds of a step at the devices' peak; its share
    of the measured time is the row's ``mfu``. ``trackers`` also receive rows, events, images and the ``config``, dotted
    names and values without secrets. ``line_every``: without a terminal, log lines with the step and the time left
    are at least so many seconds apart, except the first and the last one. Raises ``OSError`` if rows cannot be cut.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        every: int,
        active: bool,
        ideal: float | None = None,
        line_every: float | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self.active, self.every, self.total, self.folder = active, every, total, folder
        self.done, self.ideal = start, ideal  # steps done
        self.last_step = start  # of the last row
        self.line_every = LOG_EVERY if line_every is None else line_every
        self._line_at, self._text, self._step_s = -math.inf, "", 0.0
        self._saved: Path | None = None
        self._cpu_of_steps: deque[float] = deque(maxlen=1000)  # seconds of this process per step, of the last rows
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = JsonlWriter(folder / METRICS)
        self.rows.cut_after(start)
        self.rows.flush()  # the file exists, and its time is that of this start
        self.disk_fails = False
        self.trackers = Trackers(trackers, TrackedRun(folder, start, config or {}))
        self._stack, console = ExitStack(), shared_console()
        self.terminal = console.is_terminal
        bar = progress_bar(console if self.terminal else None, "train", total, done=start)
        self.bar = self._stack.enter_context(bar)
        self._restart_clocks()

    def _restart_clocks(self) -> None:
        self.clock, self.cpu_clock, self.images = time.perf_counter(), time.process_time(), 0

    def rewind(self, step: int, checkpoint: Path) -> None:
        """The run was rolled back to ``step`` steps, to ``checkpoint``: later rows are cut, as on a resume."""
        self.done, self.last_step, self._saved = step, step, checkpoint
        if not self.active:
            return
        try:
            self.rows.cut_after(step)
        except OSError as error:  # the next start cuts them
            self.note(f"{self.rows.path} keeps rows of steps after {step}: {error}", logging.WARNING)
        self.trackers.rewind(step)
        self._restart_clocks()
        self.bar.update(step)

    def step(self, step: int, images: int, row: dict[str, Any]) -> None:
        """``step`` steps are done; ``images`` were in this one. ``row`` holds plain numbers."""
        self.done, before = step, self.last_step
        due = step % self.every == 0 or step == self.total
        if due:
            self.last_step = step
        if not self.active:
            return
        self.images += images
        self.bar.update(step)
        if not due:
            self._line(step)
            return
        seconds = time.perf_counter() - self.clock
        row = {**row, "images_per_s": self.images / seconds, "step_s": seconds / max(1, step - before)}
        if self.ideal is not None:
            row["mfu"] = self.ideal / row["step_s"]
        self._cpu_of_steps.append((time.process_time() - self.cpu_clock) / max(1, step - before))
        self._restart_clocks()
        self.write(step, row)
        self._text = "  ".join(f"{short} {row[name]:.3g}" for name, short in SHOWN.items() if name in row)
        self.bar.update(step, self._text)
        self._step_s = row["step_s"]
        self._line(step)

    def _line(self, step: int) -> None:
        """A log file gets a line instead of a bar."""
        now = time.perf_counter()
        if self.terminal or (now - self._line_at < self.line_every and step != self.total):
            return
        self._line_at = now
        seconds = self._step_s or (now - self.clock) / max(1, step - self.last_step)
        left = time_left(self.total - step, 1 / max(1e-9, seconds))
        logger.info("step %d/%d%s  %s", step, self.total, left and f"  {left}", self._text or "no row yet")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is something other than steps: the next row's times leave it out."""
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            if self.active:
                self.clock += time.perf_counter() - start
                self.cpu_clock += time.process_time() - cpu

    @property
    def step_cpu_s(self) -> float | None:
        """CPU seconds of this process per step, the median over the rows of this start, without what was ``paused``."""
        return statistics.median(self._cpu_of_steps) if self._cpu_of_steps else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append one row now: also validation losses and times."""
        if not self.active:
            return
        rounded = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        self.rows.append({"step": step, **rounded})
        self.trackers.row(step, row)
        self._check_disk()

    def note(self, text: str, level: int = logging.INFO) -> None:
        """A log line."""
        if self.active:
            logger.log(level, text)

    def event(self, kind: str, text: str, *, note: bool = True, **more: Any) -> None:
        """A line of events.jsonl, and a log line unless something else prints it."""
        if self.active:
            append_event(self.folder, kind, self.done, text, **more)
            self.trackers.event(self.done, kind, redact(text))
            if note:
                logger.log(logging.INFO if kind in QUIET_KINDS else logging.WARNING, text)

    def image(self, name: str, path: Path, caption: str) -> None:
        """A PNG file for the trackers, such as a grid of samples."""
        if self.active:
            self.trackers.image(self.done, name, path, caption)

    def saved(self, checkpoint: Path | None) -> None:
        """``checkpoint`` is this process's newest complete one: an event the first time. Called after each step."""
        if checkpoint is not None and checkpoint != self._saved:
            self._saved = checkpoint
            self.event("saved", f"saved {checkpoint}", note=False, checkpoint=checkpoint.name)

    def warn(self, events: list[tuple[str, dict[str, Any]]], kind: str = "warning") -> None:
        """An event for each (message, further fields)."""
        for text, more in events:
            self.event(kind, text, **more)

    def close(self) -> None:
        if self.active:
            self._stack.close()
            for problem in self.trackers.close(complete=self.done >= self.total):
                self.event("warning", problem)
            self.rows.flush(sync=True)
            self._check_disk()
            if self.rows.error:
                lost = len(self.rows.pending) + self.rows.take_dropped()
                logger.warning("%d rows of %s are lost (%s)", lost, self.rows.path, self.rows.error.strerror)

    def _check_disk(self) -> None:
        flush_events(self.folder)
        error = self.rows.error
        if error and not self.disk_fails:
            text = (
                f"{self.rows.path} cannot be written ({error.strerror}): training continues, rows and events are buffered "
                "in memory; free disk space, or make the file writable"
            )
            self.event("warning", text, situation="disk")
        elif self.disk_fails and not error:
            dropped = self.rows.take_dropped()
            lost = f", {dropped} older ones were dropped" if dropped else ""
            text = f"{self.rows.path} can be written again: the buffered rows are written{lost}"
            self.event("warning", text, situation="disk", over=True)
        self.disk_fails = error is not None
        for problem in self.trackers.take_problems():
            self.event("warning", problem)
