"""Exit statuses of a rank. The batch scripts of slurm/ use them."""

from __future__ import annotations

PREEMPTED = 85  # saved after a signal; not 0, because SLURM counts a clean exit as completed and does not requeue it
RANK_FAILURE = 86  # because of a lost or hung rank: a crash for the batch script, which requeues
CLEAN = (0, PREEMPTED)  # of a rank that exited together with all others


class Preempted(SystemExit):
    """All ranks stop because of a signal. A SystemExit, so that the watchdog counts it as a clean end."""

    def __init__(self, signal_number: int):
        super().__init__(PREEMPTED)
        self.signal = signal_number
