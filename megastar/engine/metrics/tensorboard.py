"""TensorBoard event files. Their failure never stops a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megastar.data.images.image_files import open_image


class TensorBoardWriter:
    """``add`` until the first failure, which ``take_problem`` returns once; later calls do nothing.

    metrics.jsonl has all that TensorBoard would show.
    """

    def __init__(self, folder: Path, start: int):
        self._problem = ""
        self.writer: Any = None
        _silence_thread_errors()
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        except (OSError, UnicodeError) as error:  # its names are UTF-8
            self._drop(error)

    def add(self, row: Mapping[str, Any], step: int) -> None:
        try:
            for name, value in row.items():
                if self.writer and isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, step)
        except Exception as error:  # also of the writer's thread
            self._drop(error)

    def add_event(self, kind: str, text: str, step: int) -> None:
        try:
            if self.writer:
                self.writer.add_text(f"events/{kind}", text, step)
        except Exception as error:
            self._drop(error)

    def add_image(self, name: str, path: Path, step: int) -> None:
        try:
            if self.writer:
                with open_image(path) as image:
                    self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        except Exception as error:
            self._drop(error)

    def take_problem(self) -> str:
        """The message of a failure, once; empty: there is none."""
        problem, self._problem = self._problem, ""
        return problem

    def close(self) -> None:
        try:
            if self.writer:
                self.writer.close()
        except Exception as error:
            self._drop(error)
        self.writer = None

    def _drop(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        self._problem = f"TensorBoard event files receive no more values until the next start ({reason}); metrics.jsonl has all of them"
        self.writer = None


def _silence_thread_errors() -> None:
    """Suppress the traceback of TensorBoard's thread: ``add`` raises the same error."""
    before = threading.excepthook
    if getattr(before, "hushed", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(args)

    hook.hushed = True  # type: ignore[attr-defined]
    threading.excepthook = hook
