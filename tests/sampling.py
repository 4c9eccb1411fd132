"""Sampling in memory, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megastar.model.transformer import Transformer
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler


def sample_tokens(
    model: Transformer,
    labels: Sequence[int] | Tensor,
    *,
    seeds: Sequence[int],
    batch: int = 64,
    passes: int = 1,
    rank: int = 0,
    **options: Any,
) -> Tensor:
    """One image's codes for each label, in batches: labels (N,) -> codes (N, T) int64."""
    labels = torch.as_tensor(labels)
    sampler = Sampler(model, SamplingOptions(**options), min(batch, len(labels)), passes=passes, rank=rank)
    rows = [slice(first, first + batch) for first in range(0, len(labels), batch)]
    return torch.cat([sampler.draw(labels[r], seeds[r]) for r in rows])
