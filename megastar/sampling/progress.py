"""The bar of drawing: pictures done, pictures a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def picture_bar(
    console: Console | None, total: int, tokens: int, done: int = 0, what: str = "sampling"
) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` pictures of ``tokens`` tokens, ``done`` of them from before; the function takes tokens."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    start, drawn = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=(total - done) * tokens, said=f"{done}/{total} pictures")

        def advance(count: int) -> None:
            nonlocal drawn
            drawn += count
            rate = drawn / tokens / max(1e-9, time.perf_counter() - start)
            said = f"{done + drawn // tokens}/{total} pictures, {rate:.3g} images/s"
            bar.update(task, advance=count, said=said)

        yield advance
