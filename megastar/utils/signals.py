"""Signals that request a run to stop. No torch: a rank installs the handlers before its slow imports."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

PREEMPTED = 85  # exit status after a stop signal; not 0: SLURM requeues no job that ended cleanly
# HUP and QUIT: of a terminal that is closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def is_ignored(number: int) -> bool:
    """Whether this process ignores SIGHUP, as below nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class Preempted(SystemExit):
    """All ranks stop because of a signal. A SystemExit, so that the watchdog counts it as a clean end."""

    def __init__(self, signal_number: int):
        super().__init__(PREEMPTED)
        self.signal = signal_number


class StopFlag:
    """Set by a signal of STOP_SIGNALS; the run saves and stops after the step. A second SIGINT interrupts.

    An ignored SIGHUP (nohup) stays ignored. Python installs signal handlers in the main thread only: elsewhere the flag is
    never set by a signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in [n for n in STOP_SIGNALS if not is_ignored(n)]:
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
