"""Current phase of this rank, recorded by the training loop for the watchdog (lock-free).

One process is one rank, so there is one ``PHASE``; without a watchdog it has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megastar.config.schema import RunConfig
from megastar.data.storage.store import is_remote

STARTING = "starting"  # building engines, reading a checkpoint
DATA = "waiting for data"
SAVING = "saving"
VALIDATION = "validation"
EVALUATION = "evaluation"  # the phase begins anew with each token, batch of features and second of waiting
ENDING = "ending"

START_EXTRA = 900.0  # extra seconds for a start, including its first step
SAVE_EXTRA = 3600.0  # extra seconds for a save: ranks wait for each other's files
DATA_EXTRA = 600.0  # extra seconds on top of data.patience, for slow responses of S3


class Phase:
    """``moves`` counts every change; ``step`` is the current step, counted from 1, 0 before the first. ``listener``
    is called with each new phase, on the thread of the loop; the profiler sets it while it records."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None
        self.reset()

    def reset(self) -> None:
        self.phase, self.step, self.moves, self.steps = STARTING, 0, 0, 0
        self.done = 0  # finished steps

    def begin(self, step: int) -> None:
        self.step, self.done = step, step - 1
        self.steps += 1  # of this start
        self.moves += 1

    def finish(self, steps: int) -> None:
        self.done = steps

    def at(self, phase: str) -> None:
        self.phase = phase
        self.moves += 1
        if self.listener is not None:
            self.listener(phase)


PHASE = Phase()


def describe(phase: str, step: int) -> str:
    return f'"{phase}" of step {step}' if step else f'"{phase}"'


def limit_of(cfg: RunConfig, phase: Phase = PHASE) -> float:
    """Seconds that the rank may stay in ``phase`` before it counts as hanging; may be infinite."""
    limit = cfg.faults.hang_timeout or math.inf
    if phase.phase == ENDING and cfg.train.upload:  # an upload may take any time
        return math.inf
    if phase.phase in (SAVING, ENDING):
        return limit + SAVE_EXTRA
    if phase.steps <= 1 or phase.phase == STARTING:
        limit += START_EXTRA
    remote = is_remote(cfg.data.shards) or is_remote(cfg.data.val_shards)  # a start reads both
    if remote and phase.phase in (DATA, STARTING):
        limit += cfg.data.patience + DATA_EXTRA
    return limit
