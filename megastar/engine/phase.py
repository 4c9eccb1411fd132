"""What this rank is at, for its watchdog: the loop stamps, two stores of an attribute each time, and nothing waits.

One process is one rank, so there is one ``PHASE``; outside of a watched run the stamps change nothing.
"""

from __future__ import annotations

import math

from megastar.config.schema import RunConfig
from megastar.data.storage.protocol import is_remote

STARTING = "starting"  # engines are built, a checkpoint is read
DATA = "waiting for data"
SAVING = "saving"
VALIDATION = "validation"
ENDING = "ending"

START_EXTRA = 900.0  # seconds that a start, its first step with it, may take longer than any other step
SAVE_EXTRA = 3600.0  # as long as ranks wait for each other's files
DATA_EXTRA = 600.0  # on top of data.patience: an answer of S3 that is slow, but comes


class Phase:
    """``moves`` grows with every stamp; ``step`` is the one at work, counted from 1, 0 before the first."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.phase, self.step, self.moves, self.steps = STARTING, 0, 0, 0
        self.done = 0  # steps

    def begin(self, step: int) -> None:
        self.step, self.done = step, step - 1
        self.steps += 1  # of this start
        self.moves += 1

    def finish(self, steps: int) -> None:
        """``steps`` are done."""
        self.done = steps

    def at(self, phase: str) -> None:
        self.phase = phase
        self.moves += 1

    def __str__(self) -> str:
        return describe(self.phase, self.step)


PHASE = Phase()


def describe(phase: str, step: int) -> str:
    return f'"{phase}" of step {step}' if step else f'"{phase}"'


def limit_of(cfg: RunConfig, phase: Phase = PHASE) -> float:
    """Seconds that the rank may stay where it is; infinite where nothing is ever a hang."""
    limit = cfg.faults.hang_timeout or math.inf
    if phase.phase == ENDING and cfg.train.upload:  # uploads take what they take
        return math.inf
    if phase.phase in (SAVING, ENDING):
        return limit + SAVE_EXTRA
    if phase.steps <= 1 or phase.phase == STARTING:
        limit += START_EXTRA
    remote = is_remote(cfg.data.shards) or is_remote(cfg.data.val_shards)  # a start reads of both
    if remote and phase.phase in (DATA, STARTING):
        limit += cfg.data.patience + DATA_EXTRA
    return limit
