"""Progress of a pretokenize run, over the finished shards of all processes and the shard in progress here."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from megastar.utils.progress_bar import ProgressBar, progress_bar


class ShardProgress:
    """Counts images. Made by ``shard_progress``."""

    def __init__(self, bar: ProgressBar, sizes: Sequence[int]):
        self.bar, self.sizes = bar, sizes
        self.finished = 0  # images of finished shards
        self.current = self.here = 0  # images: of the shard in progress, of all shards by this process
        self.start = time.monotonic()

    @property
    def rate(self) -> float:
        """Images per second of this process."""
        return self.here / max(1e-9, time.monotonic() - self.start)

    def finish(self, shards: Collection[int]) -> None:
        """Set the finished shards; the one in progress is no longer counted apart."""
        self.finished, self.current = sum(self.sizes[s] for s in shards), 0
        self.advance(0)

    def advance(self, images: int) -> None:
        self.current += images
        self.here += images
        self.bar.update(self.finished + self.current, f"{self.rate:.3g} images/s here")


@contextmanager
def shard_progress(console: Console, title: str, sizes: Sequence[int]) -> Iterator[ShardProgress]:
    with progress_bar(console, title, sum(sizes)) as bar:
        yield ShardProgress(bar, sizes)
