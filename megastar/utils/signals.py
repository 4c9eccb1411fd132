"""Signals that request a run to stop. No torch: a rank installs the handlers before its slow imports."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or the first SIGINT; the run saves and stops after the step. A second SIGINT interrupts.

    Python installs signal handlers in the main thread only: elsewhere the flag is never set by a signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                self._former[number] = signal.signal(number, self._set)

    def restore(self) -> None:
        """Install the former handlers; the default one for a signal whose handler was not installed by Python."""
        while self._former:
            number, former = self._former.popitem()
            signal.signal(number, signal.SIG_DFL if former is None else former)

    def release(self) -> None:
        """``restore``, for work that a signal may end at any time; a signal caught before is raised again."""
        self.restore()
        if self.signal:
            signal.raise_signal(self.signal)

    def ignore(self) -> None:
        """Ignore signals from here on: the process exits."""
        for number in self._former:
            signal.signal(number, signal.SIG_IGN)
        self._former.clear()

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
