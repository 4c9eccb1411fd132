"""Is a loss a spike? Its z-score over the last losses, as in OLMo-core's SkipStepOptimizer: a window of 128, 6 sigma,
half a window of history before it judges. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

LEAST_SIGMA = 0.005  # of the mean: on a plateau without noise a ripple is no spike


class SpikeTest:
    """Knows the last ``window`` losses of steps that were taken. ``sigma`` 0: nothing is a spike."""

    def __init__(self, sigma: float, window: int, losses: Iterable[float] = ()):
        self.sigma, self.window = sigma, window
        self.losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def baseline(self) -> tuple[float, float]:
        """Mean and standard deviation (of a sample, and no less than ``LEAST_SIGMA`` of the mean) of the losses."""
        n = len(self.losses)
        mean = math.fsum(self.losses) / n
        variance = math.fsum([(x - mean) ** 2 for x in self.losses]) / (n - 1)
        return mean, max(math.sqrt(variance), LEAST_SIGMA * abs(mean), 1e-12)

    def check(self, loss: float) -> str:
        """What is wrong with ``loss``, which is finite, or nothing. Only a rise is a spike."""
        if not self.sigma or len(self.losses) < max(2, self.window // 2):
            return ""
        mean, deviation = self.baseline()
        z = (loss - mean) / deviation
        return f"loss {loss:.5g} is {z:.3g} sigma above {mean:.5g}" if z > self.sigma else ""
