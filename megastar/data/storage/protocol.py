"""What every store of token shards offers: a folder (store.py) or S3 (s3_store.py)."""

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
        """Whether shards come through the cache."""

    said: str  # what was last said about a wait; empty: nothing
    trouble: str  # what makes the reading slow as long as it lasts; empty: nothing

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""

    def manifest(self) -> bytes:
        """manifest.json. Raises ``UserError`` when it cannot be had."""

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        """A shard as a local file; it stays while the file or a map of it lives.

        ``stop`` ends a long wait with ``Stopped``. Raises ``UserError`` for one that is missing, changed or out of
        reach.
        """

    def index(self, info: ShardInfo) -> bytes | None:
        """The index that was kept of a shard, None without one. Nothing is promised: check it against the shard."""

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        """Keep the index of a shard for the next reader, where that is possible."""

    def audit(self, info: ShardInfo) -> tuple[BinaryIO, str]:
        """The shard as it is there now, past any cache and whatever its size, and its SHA-256. Errors as ``open``."""

    def audit_index(self, info: ShardInfo) -> bytes | None:
        """As ``index``, past any cache."""

    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        """These will be opened next, in this order; what was announced before counts no longer."""

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        """Raise ``UserError`` unless all of these can be kept at once."""

    def close(self) -> None:
        """End what runs in the background. The store can be used again."""


def is_remote(url: str | Path) -> bool:
    return str(url).startswith("s3://")
