"""Skipping a step: gradients are discarded and no weight changes, on all ranks alike.

At ZeRO stages 1 to 3, with accumulation and offload too, DeepSpeed itself skips a step whose gradient norm is not finite:
it clears the gradients and counts the step in ``skipped_steps``. A requested skip takes the same path, so that none of
DeepSpeed's state has to be restored here (verified against the source of DeepSpeed 0.19.8).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.utils import clip_grad_norm_

from megastar.engine.zero.partitions import AdamWEMA


def install_step_skip(engine: Any, optimizer: AdamWEMA) -> None:
    """Make ``engine`` skip a step when ``optimizer.skip`` is set on all ranks, and, at stage 0 too, for a non-finite norm."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        # Without ZeRO the engine clips but does not store the norm, which it reads from the optimizer, and would step even
        # when the norm is not finite. It does read ``overflow`` from there.
        def clip() -> None:
            norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)
            optimizer.record_norm(norm)

        engine.clip_fp32_gradients = clip
    elif stage < 3:
        check_overflow = zero.check_overflow

        def check(partition_gradients: bool = True) -> None:
            if optimizer.skip:
                zero.overflow = True
            elif not zero.compute_grad_norm:  # else the norm, which is checked next, makes this pass superfluous
                check_overflow(partition_gradients)

        zero.check_overflow, zero.check_grad_overflow = check, True
    else:
        norms = zero._get_norm_groups
        zero._get_norm_groups = lambda: [torch.tensor(math.inf)] if optimizer.skip else norms()
