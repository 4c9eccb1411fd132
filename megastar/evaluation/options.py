"""Options of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megastar.config.schema import DataConfig


@dataclass(frozen=True)
class Settings:
    """What a score depends on besides images and network; part of the result."""

    is_split: int = 5000
    k: int = 3
    kid_subsets: int = 100
    kid_size: int = 1000
    seed: int = 0
    allow_few: bool = False  # score fewer images than a metric requires, with a warning: for tests


@dataclass(frozen=True)
class EvaluationOptions:
    """How to score; the same for images from files, from a sampler and from a tokenizer."""

    metrics: Sequence[str] | None = None
    features: str = "efflite0"
    inception: str | Path | None = None
    inception_sha256: str | None = None
    dinov2: str | Path | None = None
    real_subset: str | None = None
    real_sha256: str | None = None
    real_tokenizer: str | Path | None = None
    data: DataConfig | None = None  # cache and patience of a reference of token shards on S3; None: the defaults
    settings: Settings = field(default_factory=Settings)
    device: torch.device | str = "cpu"
    batch: int = 32
    cache: str | Path | None = None
    out: str | Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    console: Console | None = None
    on_batch: Callable[[], None] = lambda: None  # called before each batch of the reference
