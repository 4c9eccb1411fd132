"""The interface of a store of token shards: a folder (store.py) or S3 (s3_store.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from megastar.data.storage.shard_info import ShardInfo
from megastar.data.storage.stall_timer import NEVER


class Store(Protocol):
    """What ``ShardSet`` reads from."""

    @property
    def remote(self) -> bool:
        """Whether shards are read through the cache."""

    last_message: str  # the last message about a wait; empty if there was none
    degraded: str  # why reading is slow at present; empty if it is not

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""

    def manifest(self) -> bytes:
        """Content of manifest.json. Raises ``UserError`` if it cannot be read."""

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        """A shard as a local file, which is kept while the file or a map of it exists.

        ``stop`` cancels a wait with ``Stopped``. Raises ``UserError`` for a shard that is missing, changed or
        unreachable.
        """

    def index(self, info: ShardInfo) -> bytes | None:
        """The stored index of a shard, None without one. Unchecked: compare it with the shard."""

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        """Store the index of a shard for later readers, where that is possible."""

    def open_uncached(self, name: str) -> tuple[BinaryIO, str]:
        """A shard as it is in the store now, whatever its size, and its SHA-256. Errors as ``open``."""

    def index_uncached(self, info: ShardInfo) -> bytes | None:
        """As ``index``, bypassing the cache."""

    def names(self) -> list[str]:
        """Names of all files of the store. Raises ``UserError`` for a store that does not exist."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file. Raises ``UserError`` where that is not possible."""

    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        """Fetch these shards next, in this order, in the background. Replaces the previous list."""

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        """Raise ``UserError`` unless the cache can hold all of these at once."""

    def close(self) -> None:
        """Stop the background threads. The store can be used again."""


def is_remote(url: str | Path) -> bool:
    return str(url).startswith("s3://")
