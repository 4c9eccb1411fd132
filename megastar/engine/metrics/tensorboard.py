"""TensorBoard's files. A failure to write them never stops a run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any


class TensorBoardWriter:
    """Writes until the first failure, which sets ``problem``; later calls do nothing. metrics.jsonl has the same numbers."""

    def __init__(self, folder: Path, start: int):
        self.problem = ""
        self.writer: Any = None
        _silence_thread_errors()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        except OSError as error:
            self._drop(error)

    def add(self, row: dict[str, Any], step: int) -> None:
        try:
            for name, value in row.items():
                if self.writer and isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, step)
        except Exception as error:  # errors of the writer's thread are raised here too
            self._drop(error)

    def close(self) -> None:
        try:
            if self.writer:
                self.writer.close()
        except Exception as error:
            self._drop(error)
        self.writer = None

    def _drop(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        self.problem = f"TensorBoard's files cannot be written ({reason}) and get no more numbers until the next start; metrics.jsonl has all"
        self.writer = None


def _silence_thread_errors() -> None:
    """No tracebacks of TensorBoard's writer thread: its errors are raised in ``add`` too."""
    before = threading.excepthook
    if getattr(before, "silenced", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(args)

    hook.silenced = True  # type: ignore[attr-defined]
    threading.excepthook = hook
