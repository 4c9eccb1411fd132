"""Exit statuses of a rank. The batch scripts of slurm/ use them."""

from __future__ import annotations

from megastar.utils.signals import PREEMPTED as PREEMPTED  # 85: saved after a signal
from megastar.utils.signals import RESTART as RESTART  # 87: saved because a node joins

RANK_FAILURE = 86  # because of a lost or hung rank: a crash for the batch script, which requeues
CLEAN = (0, PREEMPTED, RESTART)  # of a rank that exited together with all others
