"""The decay of the teacher's moving average over the training steps."""

from __future__ import annotations

from megastar.config.schema import SelfGuidedConfig


def decay_at(step: int, cfg: SelfGuidedConfig) -> float:
    """EMA decay of the update after optimizer step ``step`` (from 0): constant, or min(decay, (1 + t) / (10 + t))."""
    return min(cfg.teacher_decay, (1 + step) / (10 + step)) if cfg.teacher_warmup else cfg.teacher_decay
