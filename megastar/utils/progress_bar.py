"""Progress of long work: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
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

LOG_EVERY = 30.0  # seconds between lines where there is no terminal
logger = logging.getLogger(__name__)


class ProgressBar:
    """One task of ``total`` units. Made by ``progress_bar``."""

    def __init__(self, bar: Progress, title: str, total: float, done: float, log: bool):
        self.bar, self.title, self.total, self.done, self.log = bar, title, total, done, log
        self.task = bar.add_task(title, total=total, completed=done, text="")
        self.first, self.start = done, time.perf_counter()
        self._logged = self.start

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(1e-9, time.perf_counter() - self.start)

    def advance(self, units: float = 1, text: str | None = None) -> None:
        self.update(self.done + units, text)

    def update(self, done: float, text: str | None = None) -> None:
        """``done`` units in all; ``text`` is shown behind the bar."""
        self.done = done
        self.bar.update(self.task, completed=done, **({} if text is None else {"text": text}))
        if self.log and time.perf_counter() - self._logged >= LOG_EVERY:
            self._logged = time.perf_counter()
            logger.info("%s: %d of %d%s", self.title, done, self.total, f", {text}" if text else "")


@contextmanager
def progress_bar(
    console: Console | None, title: str, total: float, *, done: float = 0, bytes: bool = False, transient: bool = False
) -> Iterator[ProgressBar]:
    """A bar over ``total`` units, ``done`` of them from before; nothing without a console.

    ``bytes``: units are shown as bytes, with their rate. ``transient``: the bar disappears at the end.
    """
    numbers: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if bytes else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *numbers, TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[text]}"))
    hidden = console is None or console.quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=transient) as bar:
        yield ProgressBar(bar, title, total, done, log=hidden and console is not None and not console.quiet)


@contextmanager
def picture_bar(console: Console | None, total: int, done: int = 0) -> Iterator[Callable[[float], None]]:
    with progress_bar(console, "sampling", total, done=done) as bar:
        yield lambda now: bar.update(now, f"{bar.rate:.3g} images/s")
