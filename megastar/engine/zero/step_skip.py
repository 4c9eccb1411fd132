"""Skipping a step: the gradients are discarded and no weight changes, on all ranks alike.

DeepSpeed drops a step by itself when the gradient's norm is not finite, at ZeRO stages 1 to 3, with accumulation and
offload too: it clears what it gathered and counts in ``skipped_steps``. A skipped step takes the same path, so that no state of
DeepSpeed has to be restored here (read against DeepSpeed 0.19.8).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megastar.engine.zero.gradient_norm import GradientNorm
from megastar.engine.zero.partitions import AdamWEMA


def install_step_skip(engine: Any, optimizer: AdamWEMA) -> None:
    """Make DeepSpeed skip a step while ``optimizer.skipping(True)``, and where the norm is not finite, at every stage."""
    stage, zero, gradient = engine.zero_optimization_stage(), engine.optimizer, GradientNorm(engine)
    gradient.install()
    if stage == 0:
        # Without ZeRO the engine clips but does not store the norm, which it reads from the optimizer, and would step even
        # when the norm is not finite. It does read ``overflow`` from there.
        def clip() -> None:
            norm = gradient.clip()
            optimizer.overflow = optimizer.skip_next or not math.isfinite(norm)  # the same on all ranks
            optimizer._global_grad_norm = norm  # type: ignore[attr-defined]

        engine.clip_fp32_gradients = clip
    elif stage < 3:
        check_overflow = zero.check_overflow

        def check(partition_gradients: bool = True) -> None:
            if optimizer.skip_next:
                zero.overflow = True
            elif not zero.compute_grad_norm:  # else the norm, which is checked next, makes this pass superfluous
                check_overflow(partition_gradients)

        zero.check_overflow, zero.check_grad_overflow = check, True
    else:
        norms = zero._get_norm_groups
        zero._get_norm_groups = lambda: [torch.tensor(math.inf)] if optimizer.skip_next else norms()
