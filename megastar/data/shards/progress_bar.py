"""A progress bar over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megastar.data.storage.shard_info import ShardInfo


@contextmanager
def bar_of(what: str, shards: Sequence[ShardInfo], console: Console | None) -> Iterator[Callable[[ShardInfo], None]]:
    """Yields what to call with each shard that is done. No bar without a console that is a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    hidden = console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(what, total=sum(s.bytes for s in shards))
        yield lambda info: bar.advance(task, info.bytes)
