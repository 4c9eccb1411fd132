"""Options of sampling and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megastar.config.schema import ModelConfig
from megastar.sampling.guidance import SCHEDULES


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled; the defaults are the model's own distribution.

    ``cfg_scale`` 1 means no guidance; ``cfg_schedule`` and ``cfg_interval`` as in ``guidance.scales``; ``top_k`` 0 or
    above the vocabulary keeps all codes. With a factorised head these filters apply to each sub-code.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def problems(self, c: ModelConfig) -> list[str]:
        """One sentence for each invalid value."""
        out = []
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 1):
            out.append(f"cfg_scale {self.cfg_scale} must be at least 1 (no guidance)")
        if self.cfg_schedule not in SCHEDULES:
            out.append(f"cfg_schedule {self.cfg_schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.cfg_interval < -1:
            out.append(f"cfg_interval {self.cfg_interval} must be -1 (guide every token) or a token number")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            out.append(f"temperature {self.temperature} must be above 0; use top_k 1 for the most probable token")
        if self.top_k < 0:
            out.append(f"top_k {self.top_k} must be 0 (all of {c.vocab_size} codes) or more")
        if not 0 < self.top_p <= 1:
            out.append(f"top_p {self.top_p} must be above 0 and at most 1 (all codes)")
        return out
