"""Waiting for a store: a timer that reports and limits stalls, and threads that work under one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from megastar.data.storage.errors import Stopped, StoreUnreachable
from megastar.utils.launcher import place_of

PATIENCE = 1800.0  # seconds that an outage may last, by default
REPORT_EVERY = 10.0  # seconds between the messages about one stall
THREADS = 4  # concurrent requests of one wait
NEVER = threading.Event()  # a stop event that is never set
_SILENCE_GRACE = 60.0  # seconds
logger = logging.getLogger(__name__)


class StallTimer:
    """Time since the last progress of one wait for ``target``.

    ``report`` is called with a message every ten seconds. After ``patience`` seconds without progress the wait ends
    with ``StoreUnreachable``; slow progress is reported, but not limited. ``stop`` ends the wait with ``Stopped``.
    """

    def __init__(
        self, target: str, endpoint: str, patience: float, report: Callable[[str], None], stop: threading.Event
    ):
        self.target, self.endpoint, self.patience, self.report, self.stop = target, endpoint, patience, report, stop
        self.cancelled = threading.Event()  # tells the worker threads of this wait to end
        self.last_error, self.progress_count, self.bytes = "", 0, 0
        self._started = self._progress_at = self._reported_at = time.monotonic()
        self._stalled = False
        self._lock = threading.Lock()

    def progress(self, n: int = 0) -> None:
        """Record progress: ``n`` bytes were received."""
        with self._lock:
            now = time.monotonic()
            idle, was_stalled = now - self._progress_at, self._stalled
            self.last_error, self.progress_count, self.bytes = "", self.progress_count + 1, self.bytes + n
            self._progress_at, self._stalled = now, False
            if was_stalled:
                self._reported_at = now
        if was_stalled:
            self.report(f"reading {self.target} from {self.endpoint} resumed after {idle:.0f} s")

    def failed(self, error: object) -> None:
        """Record a failed attempt."""
        self.last_error = " ".join(f"{error}".split())[:300] or type(error).__name__

    def tick(self) -> None:
        """Call several times a second. Raises ``StoreUnreachable`` or ``Stopped`` when the wait is over."""
        if self.stop.is_set():
            raise Stopped
        now = time.monotonic()
        idle = now - self._progress_at
        # Without an error the connection may still be alive: its own timeouts come first.
        if idle >= self.patience + (0 if self.last_error else _SILENCE_GRACE):
            raise StoreUnreachable(
                f"no data for {self.target} from {self.endpoint} for {idle:.0f} s (data.patience = {self.patience:g}), last error: {self.last_error or 'no answer'}; run the same command again once the store answers"
            )
        if now - self._reported_at < REPORT_EVERY:
            return
        self._reported_at = now
        if idle >= REPORT_EVERY:
            self._stalled = True
            self.report(
                f"stalled for {idle:.0f} s: no data for {self.target} from {self.endpoint} ({self.last_error or 'no answer yet'}); retrying for up to data.patience = {self.patience:g} s"
            )
            return
        elapsed = now - self._started
        rate = f": {self.bytes / 1e6:.3g} MB so far, {self.bytes / 1e3 / elapsed:.3g} kB/s" if self.bytes else ""
        self.report(f"slow: reading {self.target} from {self.endpoint} for {elapsed:.0f} s{rate}")


def log_on_first_rank(message: str) -> None:
    """Log a message about a stall; one rank of a job is enough."""
    if place_of(os.environ).rank == 0:
        logger.warning("%s", message)


def run_in_threads(
    jobs: Sequence[Callable[[], None]], timer: StallTimer, meanwhile: Callable[[], bool] = lambda: False
) -> None:
    """Run the jobs in threads. The first error cancels the others and is raised here.

    This thread checks the timer and calls ``meanwhile`` in a loop: a short piece of work that returns False if there
    is none. The threads are daemons, so that one that hangs in a read does not block the exit of the process.
    """
    todo, errors = deque(jobs), list[BaseException]()

    def work() -> None:
        while not timer.cancelled.is_set():
            try:
                job = todo.popleft()
            except IndexError:
                return
            try:
                job()
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=work, name="s3-get", daemon=True) for _ in range(min(THREADS, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive() and not errors:
                timer.tick()
                if not meanwhile():
                    thread.join(0.02)
        if errors:
            raise errors[0]
    except BaseException:
        timer.cancelled.set()
        raise
