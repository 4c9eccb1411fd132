"""Threads that prepare the shards to be read next."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from megastar.data.storage.shard_info import ShardInfo

_IDLE = 5.0  # seconds after which a thread without work ends: a reader may not be closed


class ShardQueue:
    """Calls ``prepare(shard, closed)`` in threads, for each shard of the newest list in its order.

    ``prepare`` returns False while another process prepares the shard: it is tried again later. Its errors are ignored,
    because the reader of the shard raises them too. With ``first_alone`` the first shard is prepared before the others,
    not at the same time.
    """

    def __init__(self, prepare: Callable[[ShardInfo, threading.Event], bool], threads: int, first_alone: bool):
        self._prepare, self._count, self._first_alone = prepare, threads, first_alone
        self._changed = threading.Condition()
        self._wanted: deque[ShardInfo] = deque()
        self._first: ShardInfo | None = None  # of ``_wanted``, with ``first_alone``
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def replace(self, shards: Iterable[ShardInfo]) -> None:
        """Prepare these shards instead of those of the previous list."""
        with self._changed:
            if self._closed.is_set():
                self._closed = threading.Event()
            self._wanted = deque(shards)
            self._first = self._wanted[0] if self._wanted and self._first_alone else None
            self._changed.notify_all()
            while self._wanted and len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, args=(self._closed,), name="shard-read-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self, closed: threading.Event) -> None:
        since = time.monotonic()
        while not closed.is_set():
            with self._changed:
                if not self._wanted or (self._first is not None and self._wanted[0] is not self._first):
                    if not self._wanted and time.monotonic() - since > _IDLE and not closed.is_set():
                        self._threads.remove(threading.current_thread())
                        return
                    self._changed.wait(0.5)
                    continue
                info, since = self._wanted.popleft(), time.monotonic()
            try:
                done = self._prepare(info, closed)
            except Exception:
                if self._first_alone:
                    closed.wait(1.0)
                done = True
            with self._changed:
                if not done:
                    self._wanted.appendleft(info) if info is self._first else self._wanted.append(info)
                elif info is self._first:
                    self._first = None
                    self._changed.notify_all()
            if not done:
                closed.wait(0.1)

    def close(self) -> None:
        """Stop the threads; ``replace`` starts new ones."""
        with self._changed:
            self._closed.set()
            self._wanted.clear()
            self._first = None
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()
