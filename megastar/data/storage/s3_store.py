"""Token shards of s3://bucket/prefix, read through a cache on the node."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import BinaryIO

from megastar.config.schema import DataConfig
from megastar.data.storage.errors import CacheFull
from megastar.data.storage.s3_client import S3Folder
from megastar.data.storage.shard_cache import ShardCache
from megastar.data.storage.shard_info import MANIFEST, MAX_MANIFEST_BYTES, ShardInfo, index_name, max_index_bytes
from megastar.data.storage.shard_queue import ShardQueue
from megastar.data.storage.stall_timer import NEVER, REPORT_EVERY, StallTimer, log_on_first_rank, run_in_threads
from megastar.data.storage.verification import BeingVerified, Verifier
from megastar.errors import UserError

logger = logging.getLogger(__name__)
_FETCHERS = 3  # threads that read ahead, one shard each
_SPARE = 1 << 30  # bytes of memory to leave free
_POLL = 0.02  # seconds between checks for a shard that another process fetches


def available_memory() -> int:
    """Bytes that processes may still allocate by the kernel's estimate, or else all of the memory."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as f:
        return 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class S3Store:
    """``s3://bucket/prefix`` through a cache on the node, with the methods of ``FolderStore``.

    A shard is fetched once a node, however many processes read it. During an outage the readers wait; the first rank
    logs that every ten seconds, and after ``data.patience`` seconds the wait ends with a ``UserError``. While the
    cache's disk cannot be written, each process buffers its shards in memory.
    """

    remote = True

    def __init__(self, url: str, data: DataConfig):
        self.last_message = self.degraded = ""
        self.s3 = S3Folder(url, data.patience, self._report)
        self.cache_folder, self.max_bytes = data.cache, int(data.cache_gib * 2**30)
        self.verifier = Verifier(ctime=False)
        self._queue = ShardQueue(self._fetch_ahead, _FETCHERS, first_alone=True)

    def _report(self, message: str) -> None:
        self.last_message = message
        log_on_first_rank(message)

    @cached_property
    def cache(self) -> ShardCache:
        """Created on first use, because a manifest needs no cache. Threads that race create equal ones."""
        return ShardCache(self.cache_folder, self.max_bytes)

    def where(self, name: str) -> str:
        return self.s3.url_of(name)

    def manifest(self) -> bytes:
        f, _ = self.open_uncached(MANIFEST)
        with f:
            if os.fstat(f.fileno()).st_size > MAX_MANIFEST_BYTES:
                raise UserError(
                    f"{self.where(MANIFEST)} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: upload it again"
                )
            f.seek(0)
            return f.read()

    def open(self, info: ShardInfo, stop: threading.Event = NEVER) -> BinaryIO:
        timer = self.s3.timer(info.name, stop)
        activity, checked_at = 0, time.monotonic()
        while True:
            try:
                if f := self._open_cached(info, stop):
                    return f
                if part := self.cache.claim(info):
                    f = self._fetch(info, part, timer, required=True)
                    assert f is not None
                    self.degraded = ""
                    return f
            except CacheFull as full:
                # A timer of its own: the failed fetch has cancelled the workers of the other.
                return self._fetch_to_memory(info, self.s3.timer(info.name, stop), full)
            if (now := self.cache.activity(info)) != activity:  # another process of this node is fetching it
                activity, checked_at = now, time.monotonic()
                timer.progress()
            elif time.monotonic() - checked_at >= REPORT_EVERY / 2:
                run_in_threads([lambda: self._probe(info, timer)], timer)
                checked_at = time.monotonic()
            timer.tick()
            time.sleep(_POLL)

    def _open_cached(self, info: ShardInfo, stop: threading.Event, wait: bool = True) -> BinaryIO | None:
        """The cached shard, compared with its SHA-256; a damaged one is removed, so that it is fetched again."""
        if (f := self.cache.open(info)) is None:
            return None
        try:
            found = self.verifier.digest(f, info, stop, wait)
        except OSError as error:
            found = f"is unreadable: {error.strerror}"
        except BaseException:
            f.close()
            raise
        if found == info.sha256:
            return f
        place = self.cache.remove(f, info)
        logger.warning("%s is damaged in the cache (%s, SHA-256 %s): fetching it again", info.name, place, found)
        return None

    def _probe(self, info: ShardInfo, timer: StallTimer) -> None:
        """Find out why another process's fetch does not progress."""
        try:
            self.s3.head(info.name)
            timer.failed("another process of this node is fetching it")
        except Exception as error:
            self.s3.raise_if_permanent(error, info.name)
            timer.failed(error)

    def _fetch(self, info: ShardInfo, part: BinaryIO, timer: StallTimer, required: bool) -> BinaryIO | None:
        """Fetch a shard into the cache and check it. None if there is no room and it is not ``required``."""
        cache = self.cache
        try:
            if not cache.reserve(part, info, required):
                cache.discard(part, info)
                return None
            self._fetch_checked(info, part, timer)
            done = cache.commit(part, info)
            self.verifier.trust(done, info)
            return done
        except BaseException:
            cache.discard(part, info)
            raise

    def _fetch_checked(self, info: ShardInfo, out: BinaryIO, timer: StallTimer) -> None:
        if (found := self.s3.fetch(info.name, out, info.bytes, timer)) != info.sha256:
            raise UserError(
                f"{self.where(info.name)} has SHA-256 {found}, the manifest records {info.sha256}: it was changed, upload it again"
            )

    def _fetch_to_memory(self, info: ShardInfo, timer: StallTimer, full: CacheFull) -> BinaryIO:
        """Fetch a shard for this process alone. Raises ``full`` if there is not enough memory."""
        if info.bytes + _SPARE > available_memory():
            raise full
        self.degraded = f"{full}; until then, each process buffers its shards in memory"
        try:
            f = os.fdopen(os.memfd_create(info.name), "w+b")
        except OSError as error:
            raise full from error
        try:
            os.posix_fallocate(f.fileno(), 0, max(1, info.bytes))
            self._fetch_checked(info, f, timer)
            return f
        except BaseException as error:
            f.close()
            if isinstance(error, (OSError, CacheFull)):
                raise full from error
            raise

    def index(self, info: ShardInfo) -> bytes | None:
        if (kept := self.cache.index(info)) is not None:
            return kept
        if (data := self.index_uncached(info)) is not None:
            self.cache.keep_index(info, data)
        return data

    def keep_index(self, info: ShardInfo, data: bytes) -> None:
        self.cache.keep_index(info, data)

    def open_uncached(self, name: str) -> tuple[BinaryIO, str]:
        f = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            return f, self.s3.fetch(name, f, None, self.s3.timer(name))
        except BaseException:
            f.close()
            raise

    def index_uncached(self, info: ShardInfo) -> bytes | None:
        return self.s3.try_get(index_name(info.name), max_index_bytes(info))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.s3.list()]

    def put(self, name: str, data: bytes) -> None:
        self.s3.put(name, data)

    # Reading ahead ---------------------------------------------------------------------------------------------
    def read_ahead(self, shards: Iterable[ShardInfo]) -> None:
        wanted, room = dict[str, ShardInfo](), self.max_bytes
        for info in shards:
            if info.sha256 not in wanted:
                room -= info.bytes
                if room < 0:  # it would evict a shard that comes before it
                    break
                wanted[info.sha256] = info
        self._queue.replace(wanted.values())

    def _fetch_ahead(self, info: ShardInfo, closed: threading.Event) -> bool:
        """Fetch a shard if it is not cached and there is room; False while another process does that."""
        try:
            if f := self._open_cached(info, closed, wait=False):
                f.close()
                return True
        except BeingVerified:
            return False
        if not (part := self.cache.claim(info)):
            return False
        timer = self.s3.timer(info.name, closed, report=lambda _: None)
        if f := self._fetch(info, part, timer, required=False):
            f.close()
        return True

    def check_room(self, shards: Iterable[ShardInfo]) -> None:
        needed = sum(s.bytes for s in shards)
        if needed > self.max_bytes:
            raise UserError(
                f"data.cache_gib = {self.max_bytes / 2**30:g} is less than the {needed / 2**30:.3g} GiB of the shards that are mixed at once: raise it, or lower data.window"
            )

    def close(self) -> None:
        self._queue.close()
