"""Progress of long operations: a bar on a terminal, otherwise a log line at most every 10 seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
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
from rich.table import Column

from megastar.utils.clock import duration
from megastar.utils.printable import printable

LOG_EVERY = 10.0  # seconds between log lines without a terminal
BAR = 20  # columns
logger = logging.getLogger(__name__)
ROOT = logging.getLogger("megastar")


class ProgressBar:
    """One task of ``total`` units. Made by ``progress_bar``."""

    def __init__(self, bar: Progress, title: str, total: float, done: float, log: bool, bytes: bool = False):
        self.bar, self.title, self.total, self.done, self.log, self.bytes = bar, title, total, done, log, bytes
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
            shown = [decimal(int(n)) if self.bytes else f"{n:.0f}" for n in (done, self.total)]
            parts = [f"{self.title}: {' of '.join(shown)}", time_left(self.total - done, self.rate), text]
            logger.info(", ".join(filter(None, parts)))


@contextmanager
def progress_count(console: Console, title: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows ``title`` and a number whose total is unknown: on a terminal while the block lasts,
    otherwise in log lines; nothing below log level INFO. It may be called by several threads."""
    if console.quiet or ROOT.level > logging.INFO:
        yield lambda number: None
    elif console.is_terminal:
        with console.status(title) as status:
            yield lambda number: status.update(f"{title}: {number}")
    else:
        logged, lock = [time.perf_counter()], threading.Lock()

        def log(number: int) -> None:
            with lock:
                if time.perf_counter() - logged[0] < LOG_EVERY:
                    return
                logged[0] = time.perf_counter()
            logger.info("%s: %d", title, number)

        yield log


def time_left(units: float, rate: float) -> str:
    """ "5 min 12 s left" for the remaining ``units`` at ``rate`` units per second; empty if it is unknown or over."""
    return f"{duration(units / rate)} left" if units > 0 and rate > 0 else ""


@contextmanager
def progress_bar(
    console: Console | None, title: str, total: float, *, done: float = 0, bytes: bool = False, transient: bool = False
) -> Iterator[ProgressBar]:
    """A bar over ``total`` units, ``done`` of which are finished; nothing without a console or below log level INFO.

    ``bytes``: show units as bytes, with their rate. ``transient``: remove the bar at the end.
    """
    numbers: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if bytes else [MofNCompleteColumn()]
    # On a narrow terminal, what comes last is cut: the bar and the text.
    fixed, cut = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    head = TextColumn("{task.description}", markup=False, table_column=fixed)
    tail = TextColumn("{task.fields[text]}", markup=False, table_column=cut)
    columns = [head, *numbers, TimeRemainingColumn(table_column=Column(no_wrap=True)), BarColumn(BAR), tail]
    quiet = console is None or console.quiet or ROOT.level > logging.INFO
    hidden = quiet or console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=transient, expand=True) as bar:
        yield ProgressBar(bar, title, total, done, hidden and not quiet, bytes)
