"""Signals that request a run to stop. No torch: a rank installs the handlers before its slow imports."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or the first SIGINT; the loop saves and exits at the next step. A second SIGINT interrupts."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
