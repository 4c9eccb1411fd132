"""Exit statuses of a rank. The batch scripts of slurm/ use them."""

from __future__ import annotations

import signal

PREEMPTED = 85  # saved after a signal; not 0, because SLURM counts a clean exit as completed and does not requeue it
RANK_FAILURE = 86  # because of a lost or hung rank: a crash for the batch script, which requeues
RESTART = 87  # saved because a node joins an elastic run: its agents start the ranks again
CLEAN = (0, PREEMPTED, RESTART)  # of a rank that exited together with all others


def status_after(signal_number: int) -> int:
    """Of a rank that has saved after a stop signal."""
    return RESTART if signal_number == signal.SIGUSR2 else PREEMPTED


class Preempted(SystemExit):
    """All ranks stop because of a signal. A SystemExit, so that the watchdog counts it as a clean end."""

    def __init__(self, signal_number: int):
        super().__init__(status_after(signal_number))
        self.signal = signal_number
