"""Where a run's numbers go: metrics.jsonl, events.jsonl, TensorBoard, one live line on the console. Main rank only."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megastar.engine.metrics.tensorboard import TensorBoardWriter
from megastar.run_dir.events import append_event, flush_events
from megastar.run_dir.jsonl import JsonlWriter


class MetricsLogger:
    """``step`` after each optimizer step; a row is written every ``every`` steps and at the end.

    A resumed run cuts rows past its checkpoint, so that metrics.jsonl holds each step once. Rows that the disk does not
    take wait in memory until it does; a TensorBoard that fails is given up. ``ideal`` seconds a step would take at the
    devices' peak: its share of the time it takes is the row's ``mfu``. Raises ``OSError`` where rows must be cut and
    cannot be.
    """

    def __init__(self, folder: Path, start: int, total: int, every: int, active: bool, ideal: float | None = None):
        self.active, self.every, self.total, self.folder = active, every, total, folder
        self.done, self.ideal = start, ideal  # steps done
        self.last_step = start  # of the last row
        self._saved: Path | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = JsonlWriter(folder / "metrics.jsonl")
        self.lines.cut_after(start)
        self.lines.flush()  # the file is there, and its time says when this began
        self.disk_fails = False
        self.board = TensorBoardWriter(folder / "tensorboard", start)
        self.console = Console()
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            refresh_per_second=2,
        )
        self.task = self.bar.add_task("", total=total, completed=start, line="")
        self.bar.start()
        self.clock, self.images = time.perf_counter(), 0
        self.shown = ""

    def rewind(self, step: int, checkpoint: Path) -> None:
        """The run went back to ``step`` steps, to ``checkpoint``: the rows behind it are cut, as on a resume."""
        self.done, self.last_step, self._saved = step, step, checkpoint
        if not self.active:
            return
        try:
            self.lines.cut_after(step)
        except OSError as error:  # the next start cuts them
            self.note(f"{self.lines.path} keeps rows of the steps that were left: {error}")
        self.board.close()
        self.board = TensorBoardWriter(self.folder / "tensorboard", step)
        self.clock, self.images = time.perf_counter(), 0
        self.bar.update(self.task, completed=step)

    def step(self, step: int, images: int, row: dict[str, float]) -> None:
        """``step`` steps are done; ``images`` were in this one. ``row`` holds plain numbers."""
        self.done, before = step, self.last_step
        due = step % self.every == 0 or step == self.total
        if due:
            self.last_step = step
        if not self.active:
            return
        self.images += images
        self.bar.update(self.task, completed=step)
        if not due:
            return
        seconds = time.perf_counter() - self.clock
        row = {**row, "images_per_s": self.images / seconds, "step_s": seconds / max(1, step - before)}
        if self.ideal is not None:
            row["mfu"] = self.ideal / row["step_s"]
        self.clock, self.images = time.perf_counter(), 0
        self.write(step, row)
        names = {
            "loss": "loss",
            "loss_ar": "ar",
            "acc_step": "acc_step",
            "acc_view": "acc_view",
            "images_per_s": "images/s",
        }
        self.shown = "  ".join(f"{short} {row[name]:.3g}" for name, short in names.items() if name in row)
        self.bar.update(self.task, line=self.shown)
        if not self.console.is_terminal:  # a log file gets a line instead of a bar
            self.console.print(f"step {step}/{self.total}  {self.shown}", highlight=False)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """One row at once: validation losses and events too."""
        if not self.active:
            return
        rounded = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        self.lines.append({"step": step, **rounded})
        self.board.add(row, step)
        self._look_after_disk()

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            self.console.print(text, highlight=False)

    def event(self, kind: str, text: str, *, note: bool = True, **more: Any) -> None:
        """A line of events.jsonl, and above the bar unless something else prints it."""
        if self.active:
            append_event(self.folder, kind, self.done, text, **more)
            if note:
                self.note(text)

    def saved(self, checkpoint: Path | None) -> None:
        """``checkpoint`` is this process's newest complete one: an event the first time. Call it each step."""
        if checkpoint is not None and checkpoint != self._saved:
            self._saved = checkpoint
            self.event("saved", f"saved {checkpoint}", note=False, checkpoint=checkpoint.name)

    def warn(self, news: list[tuple[str, dict[str, Any]]], kind: str = "warning") -> None:
        """An event for each of some sentences, with its further fields."""
        for text, more in news:
            self.event(kind, text, **more)

    def close(self) -> None:
        if self.active:
            self.bar.stop()
            self.board.close()
            self.lines.flush(sync=True)
            self._look_after_disk()
            if self.lines.error:
                self.note(f"{len(self.lines.pending)} rows of {self.lines.path} are lost ({self.lines.error.strerror})")

    def _look_after_disk(self) -> None:
        flush_events(self.folder)
        problem, lost = self.lines.error, self.lines.dropped
        if problem and not self.disk_fails:
            self.event(
                "warning",
                f"{self.lines.path} cannot be written ({problem.strerror}): the training goes on, rows and events wait "
                "in memory; free space on its disk, or see that it can be written",
                situation="disk",
            )
        elif self.disk_fails and not problem:
            less = f", {lost} older ones were given up" if lost else ""
            text = f"{self.lines.path} can be written again: the rows that waited are there{less}"
            self.event("warning", text, situation="disk", over=True)
            self.lines.dropped = 0
        self.disk_fails = problem is not None
        if self.board.problem:
            self.event("warning", self.board.problem)
            self.board.problem = ""
