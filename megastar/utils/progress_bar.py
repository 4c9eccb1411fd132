"""The bar of drawing: pictures done, pictures a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def picture_bar(console: Console | None, total: int, done: int = 0) -> Iterator[Callable[[float], None]]:
    """A bar over ``total`` pictures, ``done`` of them from before; the function is told how many are done (3.5, say)."""
    columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=total - done, said=f"{done}/{total} pictures")

        def show(now: float) -> None:
            rate = (now - done) / max(1e-9, time.perf_counter() - start)
            bar.update(task, completed=now - done, said=f"{int(now)}/{total} pictures, {rate:.3g} images/s")

        yield show
