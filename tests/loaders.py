"""A ``TokenLoader`` over a folder, from the values that matter in a test, and the order of an epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megastar.config.schema import DataConfig, ModelConfig, RunConfig, SelfGuidedConfig, TrainConfig
from megastar.data.loader import TokenLoader, open_shards
from megastar.data.order import OrderSpec, sample_ids


def make_loader(
    shards: str | Path,
    *,
    seed: int,
    global_batch: int,
    views: int,
    class_dropout_prob: float,
    num_classes: int,
    vocab_size: int,
    tokens: int,
    window: int = 16,
    data: DataConfig | None = None,
    **place: Any,
) -> TokenLoader:
    """``place``: rank, world, accumulation, start_step, prefetch, device."""
    cfg = RunConfig(
        model=ModelConfig(
            vocab_size=vocab_size,
            num_classes=num_classes,
            image_tokens=tokens,
            class_dropout_prob=class_dropout_prob,
        ),
        data=replace(data or DataConfig(), shards=str(shards), window=window),
        self_guided=SelfGuidedConfig(views=views),
        train=TrainConfig(seed=seed, global_batch=global_batch),
    )
    return TokenLoader(open_shards(shards, cfg.data), cfg, **place)


def epoch_order(spec: OrderSpec, epoch: int) -> np.ndarray:
    """Every sample id once, (N,) int64."""
    return sample_ids(spec, epoch * spec.samples, spec.samples)[0]
