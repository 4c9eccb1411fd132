"""What a person sees of a long pretokenize: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megastar.data.shards.manifest import Manifest

_LINE_EVERY = 60.0  # seconds


class Finder:
    """Says how many pictures a source has shown so far."""

    def __init__(self, console: Console):
        self.status = console.status("looking for pictures")

    def __enter__(self) -> Finder:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def report(self, pictures: int) -> None:
        self.status.update(f"looking for pictures: {pictures}")


class Bar:
    """Progress of the whole set: the finished shards of all processes and the one at work here. ``with`` it."""

    def __init__(self, console: Console, about: Manifest, sizes: Sequence[int]):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("pictures, {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.console, self.sizes, self.total = console, sizes, sum(sizes)
        self.progress = Progress(*columns, console=console, speed_estimate_period=300)
        what = f"pretokenize {about.made_by['subset']}".strip()
        self.task = self.progress.add_task(what, total=self.total, rate="")
        self.done: set[int] = set()  # shards
        self.current = self.here = 0  # pictures: of the shard at work, and in all by this process
        self.at_start: int | None = None
        self.start = self.said = time.monotonic()

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @property
    def rate(self) -> float:
        """Pictures a second by this process."""
        return self.here / max(1e-9, time.monotonic() - self.start)

    def finished(self, shards: Collection[int]) -> None:
        """These shards are finished. The one at work is among them once it is."""
        self.done.update(shards)
        self.current = 0
        self._show()

    def advance(self, pictures: int) -> None:
        self.current += pictures
        self.here += pictures
        self._show()

    def _show(self) -> None:
        completed = sum(self.sizes[s] for s in self.done) + self.current
        now = time.monotonic()
        if self.at_start is None:
            self.at_start = completed
        speed = (completed - self.at_start) / max(1e-9, now - self.start)
        self.progress.update(self.task, completed=completed, rate=f"{speed:.3g}/s")
        if not self.console.is_terminal and now - self.said >= _LINE_EVERY:
            self.said = now
            left = f"{(self.total - completed) / speed / 60:.0f} min left" if speed else ""
            self.console.print(
                f"{completed} of {self.total} pictures, {speed:.3g}/s, {left}", markup=False, soft_wrap=True
            )
