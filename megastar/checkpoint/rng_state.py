"""Random states of a checkpoint: their files, and the dropout seed used when they do not match the mesh."""

from __future__ import annotations

import torch


def random_file(data_rank: int) -> str:
    return f"random-{data_rank:05d}.pt"


def seed_dropout(seed: int, data_rank: int, step: int) -> None:
    """Seed torch's generator for the steps after ``step``: different per data rank, equal within a tensor group."""
    torch.manual_seed(((seed * 1_000_003 + step) * 100_003 + data_rank) % 2**64)
