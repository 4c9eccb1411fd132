"""Where token shards lie: a folder, or s3://bucket/prefix read through a cache of the node. One interface for both.

From S3 a shard is fetched whole, checked against the manifest and mapped from the cache, so that training reads the
same bytes as from a folder. What the order needs next is fetched in the background; a run waits for S3 only where that
falls behind, and says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megastar.config.schema import DataConfig
from megastar.data.storage.protocol import Store, is_remote
from megastar.data.storage.s3_store import S3Store
from megastar.data.storage.shard_info import MANIFEST, MOST_OF_MANIFEST, index_name, most_of_index
from megastar.data.storage.stall_timer import NEVER
from megastar.errors import UserError
from megastar.utils.files import read_small, sha256_of, write_atomic

if TYPE_CHECKING:
    from megastar.data.storage.shard_info import ShardInfo


def open_store(url: str | Path, data: DataConfig | None = None) -> Store:
    """The store for a folder or ``s3://bucket/prefix``; ``data`` has its cache and patience (None: the defaults)."""
    return S3Store(str(url), data or DataConfig()) if is_remote(url) else FolderStore(url)


class FolderStore:
    """A folder of this machine: nothing is copied."""

    remote, said, trouble = False, "", ""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def manifest(self) -> bytes:
        if not self.folder.is_dir():
            raise UserError(f"token shards folder {self.folder} does not exist: make it with `megastar pretokenize`")
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{self.folder} has no {MANIFEST}: pretokenize has not finished there, run the same command again"
            )
        if (data := read_small(path, MOST_OF_MANIFEST)) is None:
            raise UserError(f"{path} cannot be read, or has over {MOST_OF_MANIFEST >> 20} MiB: copy it again")
        return data

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        path = self.folder / info.name
        if not path.is_file():
            raise UserError(
                f"token shard {path} is missing though the manifest lists it: copy it again or pretokenize again"
            )
        try:
            return path.open("rb")
        except OSError as error:  # not ours to read, or too many files are open
            raise UserError(
                f"token shard {path} cannot be opened ({error.strerror}): make it readable, raise `ulimit -n`, or lower data.window"
            ) from error

    def index(self, info: ShardInfo) -> bytes | None:
        path = self._index(info)
        with suppress(OSError):
            if path.stat().st_mtime_ns >= (self.folder / info.name).stat().st_mtime_ns:  # else it is of another tar
                return read_small(path, most_of_index(info))
        return None

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        if self.index(info) == data:  # another rank, which walked the same tar, was faster
            return
        with suppress(OSError):  # a folder that is not ours to write
            write_atomic(self._index(info), data)

    def audit(self, info: ShardInfo) -> tuple[BinaryIO, str]:
        f = self.open(info)
        return f, sha256_of(f)

    def audit_index(self, info: ShardInfo) -> bytes | None:
        return self.index(info)

    def _index(self, info: ShardInfo) -> Path:
        return self.folder / index_name(info.name)

    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        pass

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        pass

    def close(self) -> None:
        pass
