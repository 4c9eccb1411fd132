"""Where a run's numbers go: metrics.jsonl, events.jsonl, TensorBoard, one live line on the console. Main rank only."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megastar.engine.events import append_event


class Metrics:
    """``step`` after each optimizer step; a row is written every ``every`` steps and at the end.

    A resumed run cuts rows past its checkpoint, so that metrics.jsonl holds each step once.
    """

    def __init__(self, folder: Path, start: int, total: int, every: int, active: bool):
        self.active, self.every, self.total, self.folder = active, every, total, folder
        self.done = start  # steps
        self._saved: Path | None = None
        self._waits: list[float] = []
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._cut(start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
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
        self.clock, self.images, self.last_step = time.perf_counter(), 0, start
        self.shown = ""

    def _cut(self, start: int) -> None:
        """Leave the rows up to step ``start``, and open the file."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= start]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            temporary.replace(path)
        self.file = path.open("a")

    def rewind(self, step: int, checkpoint: Path) -> None:
        """The run went back to ``step`` steps, to ``checkpoint``: the rows behind it are cut, as on a resume."""
        self.done, self._saved = step, checkpoint
        self._waits.clear()
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.file.close()
        self._cut(step)
        self.board.close()
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        self.clock, self.images, self.last_step = time.perf_counter(), 0, step
        self.bar.update(self.task, completed=step)

    def waited(self, seconds: float) -> None:
        """How long a step waited for data on its slowest rank; the next row has the mean as ``data_wait_s``."""
        self._waits.append(seconds)

    def step(self, step: int, images: int, row: dict[str, float]) -> None:
        """``step`` steps are done; ``images`` were in this one. ``row`` holds plain numbers."""
        self.done = step
        if not self.active:
            return
        self.images += images
        self.bar.update(self.task, completed=step)
        if step % self.every and step != self.total:
            return
        seconds = time.perf_counter() - self.clock
        row = {**row, "images_per_s": self.images / seconds, "step_s": seconds / max(1, step - self.last_step)}
        if self._waits:
            row["data_wait_s"] = sum(self._waits) / len(self._waits)
            self._waits.clear()
        self.clock, self.images, self.last_step = time.perf_counter(), 0, step
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
        self.file.write(json.dumps({"step": step, **rounded}) + "\n")
        self.file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

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

    def close(self) -> None:
        if self.active:
            self.bar.stop()
            self.file.close()
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # a line cut by a crash
