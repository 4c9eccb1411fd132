"""Token shards of s3://bucket/prefix, read through a cache on the node."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO

from megastar.config.schema import DataConfig
from megastar.data.storage.errors import CacheFull
from megastar.data.storage.s3_client import S3Folder
from megastar.data.storage.shard_cache import ShardCache
from megastar.data.storage.shard_info import MANIFEST, MOST_OF_MANIFEST, ShardInfo, index_name, most_of_index
from megastar.data.storage.stall_timer import NEVER, SAY_EVERY, StallTimer, run_in_threads, say_on_main
from megastar.errors import UserError

_FETCHERS = 3  # shards that are read ahead at once


_SPARE = 1 << 30  # bytes of memory that shards do not take


_POLL = 0.02  # seconds between looks at what another process of the node fetches


def available_memory() -> int:
    """Bytes that the kernel says processes may still take; without its word, all there are."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as f:
        return 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class S3Store:
    """``s3://bucket/prefix`` through a cache of the node.

    However many processes of a node ask for a shard, one fetches it. An outage makes the readers wait; the main rank
    says so every ten seconds, and after ``data.patience`` seconds they end with a ``UserError``. Where the disk of the
    cache takes nothing, each process keeps the shards that it reads in memory.
    """

    remote = True

    def __init__(self, url: str, data: DataConfig):
        self.said = self.trouble = ""
        self.s3 = S3Folder(url, data.patience, self._say)
        self.folder, self.bound = data.cache, int(data.cache_gib * 2**30)
        self._cache: ShardCache | None = None
        self._changed = threading.Condition()
        self._wanted: deque[ShardInfo] = deque()
        self._first: ShardInfo | None = None  # of what was announced: till it is here, it has the network for itself
        self._closed = threading.Event()
        self._fetchers: list[threading.Thread] = []

    def _say(self, line: str) -> None:
        self.said = line
        say_on_main(line)

    @property
    def cache(self) -> ShardCache:
        """Made when the first shard is wanted: a manifest needs none."""
        with self._changed:
            if self._cache is None:
                self._cache = ShardCache(self.folder, self.bound)
            return self._cache

    def where(self, name: str) -> str:
        return self.s3.url_of(name)

    def manifest(self) -> bytes:
        with tempfile.TemporaryFile() as f:
            self.s3.fetch(MANIFEST, f, None, self.s3.stall(MANIFEST))
            if f.seek(0, os.SEEK_END) > MOST_OF_MANIFEST:
                raise UserError(f"{self.where(MANIFEST)} has over {MOST_OF_MANIFEST >> 20} MiB: upload it again")
            f.seek(0)
            return f.read()

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        stall = self.s3.stall(info.name, stop)
        activity, asked = 0, time.monotonic()
        while True:
            if f := self.cache.open(info):
                return f
            try:
                if part := self.cache.claim(info):
                    f = self._fetch(info, part, stall, must=True)
                    assert f is not None
                    self.trouble = ""
                    return f
            except CacheFull as full:
                return self._into_memory(info, stall, full)
            if (now := self.cache.activity(info)) != activity:  # another reader of this node fetches it, and gets on
                activity, asked = now, time.monotonic()
                stall.moved()
            elif time.monotonic() - asked >= SAY_EVERY / 2:
                run_in_threads([lambda: self._why(info, stall)], stall)
                asked = time.monotonic()
            stall.tick()
            time.sleep(_POLL)

    def _why(self, info: ShardInfo, stall: StallTimer) -> None:
        """Learn for ourselves what holds up the reader that fetches the shard."""
        try:
            self.s3.head(info.name)
            stall.failed("another reader of this node is fetching it")
        except Exception as error:
            stall.failed(self.s3.passing(error, info.name))

    def _fetch(self, info: ShardInfo, part: BinaryIO, stall: StallTimer, must: bool) -> BinaryIO | None:
        """From S3 into the cache, checked. None where there is no room for one that is not a ``must``."""
        cache = self.cache
        try:
            if not cache.reserve(part, info, must):
                cache.discard(part, info)
                return None
            self._fetch_checked(info, part, stall)
            return cache.keep(part, info)
        except BaseException:
            cache.discard(part, info)
            raise

    def _fetch_checked(self, info: ShardInfo, out: BinaryIO, stall: StallTimer) -> None:
        if (found := self.s3.fetch(info.name, out, info.bytes, stall)) != info.sha256:
            raise UserError(
                f"{self.where(info.name)} has SHA-256 {found}, the manifest says {info.sha256}: it was changed, upload it again"
            )

    def _into_memory(self, info: ShardInfo, stall: StallTimer, full: CacheFull) -> BinaryIO:
        """For this process alone, as long as it reads there. Raises ``full`` where there is no such memory."""
        if info.bytes + _SPARE > available_memory():
            raise full
        self.trouble = f"{full}; till then each process keeps the shards that it reads in memory"
        try:
            f = os.fdopen(os.memfd_create(info.name), "w+b")
        except OSError as error:
            raise full from error
        try:
            os.posix_fallocate(f.fileno(), 0, max(1, info.bytes))
            self._fetch_checked(info, f, stall)
            return f
        except BaseException as error:
            f.close()
            if isinstance(error, (OSError, CacheFull)):
                raise full from error
            raise

    def index(self, info: ShardInfo) -> bytes | None:
        if (kept := self.cache.index(info)) is not None:
            return kept
        if (data := self.audit_index(info)) is not None:
            self.cache.keep_index(info, data)
        return data

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        self.cache.keep_index(info, data)

    def audit(self, info: ShardInfo) -> tuple[BinaryIO, str]:
        f = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            return f, self.s3.fetch(info.name, f, None, self.s3.stall(info.name))
        except BaseException:
            f.close()
            raise

    def audit_index(self, info: ShardInfo) -> bytes | None:
        return self.s3.try_get(index_name(info.name), most_of_index(info))  # uploaded with the shards

    # Reading ahead ---------------------------------------------------------------------------------------------
    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        wanted, room = dict[str, "ShardInfo"](), self.bound
        for info in shards:
            if info.sha256 not in wanted:
                room -= info.bytes
                if room < 0:  # one more would push out one that comes before it
                    break
                wanted[info.sha256] = info
        with self._changed:
            if self._closed.is_set():
                self._closed = threading.Event()
            self._wanted = deque(wanted.values())
            self._first = self._wanted[0] if self._wanted else None
            self._changed.notify_all()
        while len(self._fetchers) < _FETCHERS:
            thread = threading.Thread(
                target=self._read_ahead, args=(self._closed,), name="shard-read-ahead", daemon=True
            )
            self._fetchers.append(thread)
            thread.start()

    def _read_ahead(self, closed: threading.Event) -> None:
        while not closed.is_set():
            with self._changed:
                if not self._wanted or (self._first is not None and self._wanted[0] is not self._first):
                    self._changed.wait(0.5)
                    continue
                info = self._wanted.popleft()
            try:
                done = self._one_ahead(info, closed)
            except Exception:
                closed.wait(1.0)  # ``open`` will meet it too, and say it
                done = True
            with self._changed:
                if not done:  # another process is at it: see later whether it went well
                    self._wanted.appendleft(info) if info is self._first else self._wanted.append(info)
                elif info is self._first:
                    self._first = None
                    self._changed.notify_all()
            if not done:
                closed.wait(0.1)

    def _one_ahead(self, info: ShardInfo, closed: threading.Event) -> bool:
        """Fetch it, if that is needed and possible; False while another reader of the node does."""
        if f := self.cache.open(info):
            f.close()
        elif part := self.cache.claim(info):
            stall = self.s3.stall(info.name, closed, say=lambda _: None)
            if f := self._fetch(info, part, stall, must=False):
                f.close()
        else:
            return False
        return True

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        needed = sum(s.bytes for s in shards)
        if needed > self.bound:
            raise UserError(
                f"data.cache_gib = {self.bound / 2**30:g} is less than the {needed / 2**30:.3g} GiB of the shards that are mixed at once: raise it, or lower data.window"
            )

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._wanted.clear()
            self._first = None
            self._changed.notify_all()
        for thread in self._fetchers:
            thread.join()
        self._fetchers = []
