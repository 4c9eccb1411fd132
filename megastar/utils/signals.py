"""Signals that request a process to stop. No torch: a rank installs the handlers before its slow imports."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Exit status after a stop signal; not 0, because SLURM counts a clean exit as completed and does not requeue it.
PREEMPTED = 85
RESTART = 87  # saved because a node joins an elastic run: its agents start the ranks again
# HUP, QUIT: a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
RANK_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR2)  # SIGUSR2: sent by an elastic agent when a node joins


def is_ignored(number: int) -> bool:
    """Whether this process ignores SIGHUP, as under nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def status_after(signal_number: int) -> int:
    """The exit status of a rank that has saved after a stop signal."""
    return RESTART if signal_number == signal.SIGUSR2 else PREEMPTED


class Preempted(SystemExit):
    """All ranks stop because of a signal. A SystemExit, so that the watchdog counts it as a clean end."""

    def __init__(self, signal_number: int):
        super().__init__(status_after(signal_number))
        self.signal = signal_number


# Seconds within which further signals count as the same request: a launcher, a shell and timeout(1) all send one.
REPEATED = 2.0
LONGEST_IMPORT = 120.0  # seconds


class StopSignal(KeyboardInterrupt):
    """A stop signal, raised in the main thread, where ``finally`` blocks remove incomplete files."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number

    def __str__(self) -> str:
        return signal.Signals(self.signal).name


@contextmanager
def raise_stopped() -> Iterator[None]:
    """In the block, the first stop signal raises ``StopSignal``; one more than ``REPEATED`` s later ends the process.

    An ignored signal, such as HUP under nohup, stays ignored. A signal during an import is raised after the import: the
    initialization of a C++ library may not survive an exception. Has no effect outside the main thread.
    """
    first: list[float] = []
    deferred: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if (
            not first
            and is_importing(frame)
            and time.monotonic() - (deferred or [time.monotonic()])[0] < LONGEST_IMPORT
        ):
            deferred.append(time.monotonic())
            later = threading.Timer(0.05, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
        elif not first:
            first.append(time.monotonic())
            raise StopSignal(number)
        elif time.monotonic() - first[0] > REPEATED:
            os._exit(128 + number)

    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                former[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for caught, handler in former.items():
            if signal.getsignal(caught) is handle:
                signal.signal(caught, signal.SIG_DFL if handler is None else handler)


def is_importing(frame: FrameType | None) -> bool:
    """Whether ``frame`` is within an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class StopFlag:
    """Set by a signal of RANK_SIGNALS; the run saves and stops after the step. A second SIGINT interrupts.

    An ignored SIGHUP (nohup) stays ignored. Python installs signal handlers in the main thread only: elsewhere the flag is
    never set by a signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in [n for n in RANK_SIGNALS if not is_ignored(n)]:
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
