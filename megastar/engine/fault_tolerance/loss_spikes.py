"""Detects loss spikes by the z-score over the last losses, as OLMo-core's SkipStepOptimizer does: a window of 128, 6 sigma,
no detection before half a window of history. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

MIN_SIGMA = 0.005  # of the mean: small ripples on a flat plateau are not spikes


class SpikeTest:
    """Holds the last ``window`` losses of accepted steps. ``sigma`` 0: no loss is a spike."""

    def __init__(self, sigma: float, window: int, losses: Iterable[float] = ()):
        self.sigma, self.window = sigma, window
        self.losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def baseline(self) -> tuple[float, float]:
        """Mean and sample standard deviation (at least ``MIN_SIGMA`` of the mean) of the losses."""
        n = len(self.losses)
        mean = math.fsum(self.losses) / n
        variance = math.fsum([(x - mean) ** 2 for x in self.losses]) / (n - 1)
        return mean, max(math.sqrt(variance), MIN_SIGMA * abs(mean), 1e-12)

    def check(self, loss: float) -> str:
        """A description of the spike, or the empty string. ``loss`` is finite; only a rise is a spike."""
        if not self.sigma or len(self.losses) < max(2, self.window // 2):
            return ""
        mean, deviation = self.baseline()
        z = (loss - mean) / deviation
        return f"loss {loss:.5g} is {z:.3g} sigma above {mean:.5g}" if z > self.sigma else ""
