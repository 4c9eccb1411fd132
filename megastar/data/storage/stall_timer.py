"""Waiting for a store: the clock that says so and ends it, and threads that work under such a clock."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from megastar.data.storage.errors import OutOfReach, Stopped

PATIENCE = 1800.0  # seconds that an outage may last, by default
SAY_EVERY = 10.0  # seconds between the lines of a stall
_UNTOLD = 60.0  # seconds
THREADS = 4  # that work at once for one wait
NEVER = threading.Event()  # a stop that does not come


class StallTimer:
    """How long ``what`` has not moved: says so every ten seconds, and ends the wait after ``patience`` seconds
    with ``OutOfReach``.

    What moves slowly is waited for without end, and told of as well.

    ``say`` takes each line; ``stop`` ends the wait with ``Stopped``.
    """

    def __init__(self, what: str, endpoint: str, patience: float, say: Callable[[str], None], stop: threading.Event):
        self.what, self.endpoint, self.patience, self.say, self.stop = what, endpoint, patience, say, stop
        self.over = threading.Event()  # for the threads that work for this wait
        self.problem, self.moves, self.bytes = "", 0, 0
        self._began = self._moved = self._said = time.monotonic()
        self._stalled = False
        self._lock = threading.Lock()

    def moved(self, n: int = 0) -> None:
        """``n`` bytes came."""
        with self._lock:
            now = time.monotonic()
            idle, told = now - self._moved, self._stalled
            self.problem, self.moves, self.bytes = "", self.moves + 1, self.bytes + n
            self._moved, self._stalled = now, False
            if told:
                self._said = now
        if told:
            self.say(f"{self.what} comes again from {self.endpoint} after {idle:.0f} s")

    def failed(self, error: object) -> None:
        """An attempt brought nothing."""
        self.problem = " ".join(f"{error}".split())[:300] or type(error).__name__

    def tick(self) -> None:
        """Call it every fraction of a second. Raises ``OutOfReach`` or ``Stopped`` when the wait is over."""
        if self.stop.is_set():
            raise Stopped
        now = time.monotonic()
        idle = now - self._moved
        # Without an error, bytes may be on the way: the connection's own time limits speak first.
        if idle >= self.patience + (0 if self.problem else _UNTOLD):
            raise OutOfReach(
                f"{self.what} did not come from {self.endpoint} for {idle:.0f} s (data.patience = {self.patience:g}), the last error: {self.problem or 'no answer'}: once the store answers, run the same command again"
            )
        if now - self._said < SAY_EVERY:
            return
        self._said = now
        if idle < SAY_EVERY:
            rate = (
                f": {self.bytes / 1e6:.3g} MB so far, {self.bytes / 1e3 / (now - self._began):.3g} kB/s"
                if self.bytes
                else ""
            )
            self.say(f"slow: waiting for {self.what} from {self.endpoint} for {now - self._began:.0f} s{rate}")
        else:
            self._stalled = True
            self.say(
                f"stalled for {idle:.0f} s: {self.what} does not come from {self.endpoint} ({self.problem or 'no answer yet'}); trying until data.patience = {self.patience:g} s"
            )


def say_on_main(line: str) -> None:
    """One line on the console, from the first rank of all."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with suppress(OSError):  # a full disk below the log is no trouble of the store's
            print(line, flush=True)


def run_in_threads(
    jobs: Sequence[Callable[[], None]], stall: StallTimer, meanwhile: Callable[[], bool] = lambda: False
) -> None:
    """Run the jobs in threads; the first error ends them all and comes out.

    Here the clock is watched, and ``meanwhile`` is called again and again: a short piece of work, False without one.

    The threads are daemons: one that hangs in a read holds nobody up.
    """
    todo, errors = deque(jobs), list[BaseException]()

    def work() -> None:
        while not stall.over.is_set():
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
                stall.tick()
                if not meanwhile():
                    thread.join(0.02)
        if errors:
            raise errors[0]
    except BaseException:
        stall.over.set()
        raise
