"""The random states of this process, kept through work that may draw from them."""

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
