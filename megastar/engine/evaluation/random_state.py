"""What work beside the training must leave as it was: the random states of this process, the choice of algorithms."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Random states of torch (CPU and ``device``), numpy and Python are after the block what they were before it."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@contextmanager
def any_algorithms() -> Iterator[None]:
    """Allow operations that ``train.deterministic`` refuses, such as the cumulative sum on a GPU with which tokens are drawn."""
    refused, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(refused, warn_only=warned)
