"""A tracker in a thread of its own: the training loop only puts a message into a queue."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from megastar.engine.metrics.trackers.tracker import TrackedRun, Tracker

MOST_WAITING = 1000  # messages; later ones are dropped while the queue is full
HANGS = 60.0  # seconds of one call after which the tracker is reported
ALL_ELSE = "metrics.jsonl and events.jsonl have everything"


class TrackerThread:
    """``send`` never blocks and never raises. ``take_problem`` returns the message about a failing or hanging tracker
    once; after a failure nothing more is sent until the next start."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun):
        self.name, self._tracker = name, tracker
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(MOST_WAITING)
        self._problem, self._warned, self._failed = "", False, False
        self._since: float | None = None  # when the call in progress began
        self._dropped = 0
        self._queue.put(("start", (run,)))
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, method: str, *args: Any) -> None:
        """Call ``method`` of the tracker later, after those sent before."""
        if self._failed:
            return
        try:
            self._queue.put_nowait((method, args))
        except queue.Full:
            self._dropped += 1
            self._warn(f"{self.name} does not keep up: rows are dropped for it; {ALL_ELSE}")

    def take_problem(self) -> str:
        """The message about a failure or a hang, returned once; empty if nothing failed."""
        since = self._since
        if since is not None and time.monotonic() - since > HANGS:
            self._warn(
                f"{self.name} has not responded for {HANGS:.0f} s: training continues, up to {MOST_WAITING} rows and events "
                f"are kept for it; {ALL_ELSE}"
            )
        problem, self._problem = self._problem, ""
        return problem

    def begin_close(self, complete: bool) -> None:
        """Ask the tracker to finish, without waiting."""
        self.send("finish", complete)
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._failed = True  # ends the thread after its call

    def wait_closed(self, deadline: float) -> str:
        """Wait until ``deadline`` (``time.monotonic``); the message about what was not sent, or empty."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        left = self._queue.qsize() + self._dropped
        if self._thread.is_alive():
            self._failed = True
            return f"{self.name} did not finish in time: {left} of its rows and events were not sent; {ALL_ELSE}"
        return self.take_problem()

    def _work(self) -> None:
        while not self._failed and (message := self._queue.get()) is not None:
            method, args = message
            self._since = time.monotonic()
            try:
                getattr(self._tracker, method)(*args)
            except BaseException as error:  # a library may raise SystemExit
                self._failed = True
                self._warned = False  # the cause is reported even after a hang
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self._warn(f"{self.name} receives nothing more until the next start ({reason}); {ALL_ELSE}")
            self._since = None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned, self._problem = True, text
