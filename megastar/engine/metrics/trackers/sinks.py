"""All trackers of a run behind one object."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megastar.engine.metrics.tensorboard import TensorBoardWriter
from megastar.engine.metrics.trackers.thread import TrackerThread
from megastar.engine.metrics.trackers.tracker import TrackedRun, Tracker, numbers

CLASSES = {"wandb": "WandbTracker", "trackio": "TrackioTracker", "mlflow": "MlflowTracker"}
CLOSING = 10.0  # seconds that all trackers together may take to finish: a stopped run must leave in time


class Trackers:
    """Rows, events and images to each tracker of ``names``. No call blocks or raises.

    TensorBoard's writer has a queue and a thread of its own; each other tracker is behind a ``TrackerThread``.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun):
        self._run = run
        self.board = self._open_board(run.start) if "tensorboard" in names else None
        self.threads = [TrackerThread(name, make_tracker(name), run) for name in names if name != "tensorboard"]

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        if self.board:
            self.board.add(row, step)
        if self.threads:
            values = numbers(row)
            for thread in self.threads:
                thread.send("row", step, values)

    def event(self, step: int, kind: str, text: str) -> None:
        if self.board:
            self.board.add_event(kind, text, step)
        for thread in self.threads:
            thread.send("event", step, kind, text)

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        if self.board:
            self.board.add_image(name, path, step)
        for thread in self.threads:
            thread.send("image", step, name, path, caption)

    def rewind(self, step: int) -> None:
        """The run was rolled back to ``step`` steps."""
        if self.board:
            self.board.close()
            self.board = self._open_board(step)

    def take_problems(self) -> list[str]:
        """Messages about failing or hanging trackers, each once."""
        found = [self.board.take_problem()] if self.board else []
        found += [thread.take_problem() for thread in self.threads]
        return [problem for problem in found if problem]

    def close(self, complete: bool) -> list[str]:
        """Finish all within ``CLOSING`` seconds; messages about those that did not."""
        if self.board:
            self.board.close()
        for thread in self.threads:
            thread.begin_close(complete)
        deadline = time.monotonic() + CLOSING
        return [problem for thread in self.threads if (problem := thread.wait_closed(deadline))]

    def _open_board(self, step: int) -> TensorBoardWriter:
        return TensorBoardWriter(self._run.folder / "tensorboard", step)


def make_tracker(name: str) -> Tracker:
    """The tracker of that name; its library is imported in ``start``."""
    module = importlib.import_module(f"megastar.engine.metrics.trackers.{name}")
    made: Tracker = getattr(module, CLASSES[name])()
    return made
