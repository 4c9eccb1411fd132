"""Signals that request a run to stop. No torch: a rank installs the handlers before its slow imports."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or the first SIGINT; the run saves and stops after the step. A second SIGINT interrupts.

    Python installs signal handlers in the main thread only: elsewhere the flag is never set by a signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._former[number] = signal.signal(number, self._set)

    def restore(self) -> None:
        """Install the handlers that were there before."""
        while self._former:
            signal.signal(*self._former.popitem())

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
