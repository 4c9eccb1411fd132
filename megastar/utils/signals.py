"""Signals that ask a run to stop. Without torch: a rank listens from its first tenth of a second, before the imports."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Set by TERM, USR1 or the first INT; the loop saves and leaves at the next step. A second INT ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
