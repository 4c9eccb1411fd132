"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """How ``Trainer.fit`` ended. ``signal``: the stop signal that ended it early, 0 if all steps are done."""

    step: int
    checkpoint: Path | None
    signal: int = 0

    @property
    def finished(self) -> bool:
        return not self.signal
