"""Progress of long operations: a bar on a terminal, otherwise a log line every 30 seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megastar.utils.printable import printable

LOG_EVERY = 30.0  # seconds between log lines without a terminal
logger = logging.getLogger(__name__)
ROOT = logging.getLogger("megastar")


class ProgressBar:
    """One task of ``total`` units. Made by ``progress_bar``."""

    def __init__(self, bar: Progress, title: str, total: float, done: float, log: bool):
        self.bar, self.title, self.total, self.done, self.log = bar, title, total, done, log
        self.task = bar.add_task(printable(title), total=total, completed=int(done), text="")
        self.first, self.start = done, time.perf_counter()
        self._logged = self.start

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.first) / max(1e-9, time.perf_counter() - self.start)

    def advance(self, units: float = 1, text: str | None = None) -> None:
        self.update(self.done + units, text)

    def update(self, done: float, text: str | None = None) -> None:
        """Set the total of finished units; ``text`` is shown after the bar."""
        self.done = done
        self.bar.update(self.task, completed=done)
        if text is not None:
            self.bar.update(self.task, text=printable(text))
        if self.log and time.perf_counter() - self._logged >= LOG_EVERY:
            self._logged = time.perf_counter()
            logger.info("%s: %d of %d%s", self.title, done, self.total, f", {text}" if text else "")


@contextmanager
def progress_bar(
    console: Console | None, title: str, total: float, *, done: float = 0, bytes: bool = False, transient: bool = False
) -> Iterator[ProgressBar]:
    """A bar over ``total`` units, ``done`` of which are finished; nothing without a console or below log level INFO.

    ``bytes``: show units as bytes, with their rate. ``transient``: remove the bar at the end.
    """
    numbers: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if bytes else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *numbers, TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[text]}", markup=False))
    quiet = console is None or console.quiet or ROOT.level > logging.INFO
    hidden = quiet or console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=transient) as bar:
        yield ProgressBar(bar, title, total, done, log=hidden and not quiet)
