"""Options of sampling and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megastar.config.schema import ModelConfig
from megastar.sampling.guidance import SCHEDULES
from megastar.sampling.step_schedules import STEP_SCHEDULES, diagonals, token_counts

TOKEN_ORDERS = ("auto", "raster", "random")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled; the defaults are the model's own distribution.

    ``cfg_scale`` 1 means no guidance; ``cfg_schedule`` and ``cfg_interval`` as in ``guidance.scales``; ``top_k`` 0 or
    above the vocabulary keeps all codes. With a factorised head these filters apply to each sub-code.

    For networks of random order: ``parallel_steps`` draws the tokens in this many steps instead of one by one (0),
    ``schedule`` as in ``step_schedules.token_counts``, or diagonal: one diagonal of the grid per step, without
    ``parallel_steps``; ``token_order`` raster, random (a permutation of each image, from its seed), or auto: random with
    ``parallel_steps``, else raster.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    parallel_steps: int = 0
    schedule: str = "cosine"
    token_order: str = "auto"

    @property
    def permutes(self) -> bool:
        if self.schedule == "diagonal":
            return True
        return self.token_order == "random" or (self.token_order == "auto" and self.parallel_steps > 0)

    def token_counts(self, tokens: int) -> list[int]:
        """The number of tokens that each step draws."""
        if self.schedule == "diagonal":
            return diagonals(tokens)[1]
        return token_counts(tokens, self.parallel_steps or tokens, self.schedule)

    def recorded(self) -> dict[str, Any]:
        """The fields for the record of images; those of random order only where they are used: older records lack them."""
        fields = dict(vars(self))
        del fields["token_order"]
        if self.schedule == "diagonal":
            return fields | {"token_order": "diagonal"}
        if not self.parallel_steps:
            del fields["parallel_steps"], fields["schedule"]
        return fields | ({"token_order": "random"} if self.permutes else {})

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
        if self.parallel_steps < 0:
            out.append(f"parallel_steps {self.parallel_steps} must be 0 (one token per step) or a number of steps")
        if self.schedule not in STEP_SCHEDULES:
            out.append(f"schedule {self.schedule!r}: choose one of {', '.join(STEP_SCHEDULES)}")
        if self.token_order not in TOKEN_ORDERS:
            out.append(f"token_order {self.token_order!r}: choose one of {', '.join(TOKEN_ORDERS)}")
        if self.schedule == "diagonal":
            out += self._diagonal_problems(c)
        if c.target_position == "none":
            trained = "these weights were trained in raster order, and only a network of random order (token_order.kind=random)"
            if self.parallel_steps:
                out.append(
                    f"parallel_steps {self.parallel_steps}: {trained} draws several tokens per step: leave it out"
                )
            if self.schedule == "diagonal":
                out.append(f"schedule diagonal: {trained} draws several tokens per step: leave it out")
            if self.token_order == "random":
                out.append(f"token_order random: {trained} draws tokens in another order: leave it out")
        elif self.parallel_steps > c.image_tokens:
            out.append(
                f"parallel_steps {self.parallel_steps} must be at most {c.image_tokens}, the tokens of an image: each step "
                "draws one or more"
            )
        return out

    def _diagonal_problems(self, c: ModelConfig) -> list[str]:
        steps = 2 * c.grid - 1
        out = []
        if self.parallel_steps not in (0, steps):
            out.append(
                f"parallel_steps {self.parallel_steps}: schedule diagonal draws one diagonal of the {c.grid} x {c.grid} tokens per "
                f"step, {steps} steps: leave it out"
            )
        if self.token_order != "auto":
            out.append(f"token_order {self.token_order}: schedule diagonal determines the order: leave it out")
        return out
