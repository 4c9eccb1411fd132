"""Parallel decoding: how many tokens each step draws, and which. T image tokens. Without torch, for the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PART_SCHEDULES = ("cosine", "uniform")  # parts of any order
STEP_SCHEDULES = (*PART_SCHEDULES, "diagonal")


class DecodingStep(NamedTuple):
    """``drawn`` tokens, at places first .. first + drawn - 1 of the order. The cache has the keys and values of
    the inputs before ``start``."""

    start: int
    first: int
    drawn: int


def token_counts(tokens: int, steps: int, schedule: str = "cosine") -> list[int]:
    """Tokens that each of ``steps`` steps draws: at least one, in all ``tokens``.

    ``uniform``: equal parts, as nearly as possible, smaller ones first. ``cosine``: after s of N steps T (1 - cos(pi s / 2 N))
    tokens are drawn, so few at first, when little is known (MaskGIT, arXiv 2202.04200; RandAR, arXiv 2412.01827).
    """
    assert 1 <= steps <= tokens and schedule in PART_SCHEDULES, (tokens, steps, schedule)
    counts, done = [], 0
    for s in range(1, steps + 1):
        share = s / steps if schedule == "uniform" else 1 - math.cos(math.pi / 2 * s / steps)
        until = tokens if s == steps else math.floor(tokens * share + 1e-9)
        until = max(done + 1, min(until, tokens - (steps - s)))  # each later step needs a token
        counts.append(until - done)
        done = until
    return counts


def diagonals(tokens: int) -> tuple[list[int], list[int]]:
    """The order of the grid's positions by diagonals, r + c = 0, 1, ..., each from its top, and the tokens of each: 2 g - 1
    steps for a grid of g x g.

    A token is drawn when its left and upper neighbours are known, as in raster order, and the tokens of a step are no
    neighbours of each other (as in NAR, arXiv 2503.10696).
    """
    side = math.isqrt(tokens)
    assert side * side == tokens, tokens
    order = sorted(range(tokens), key=lambda p: (p // side + p % side, p))
    return order, [min(d + 1, 2 * side - 1 - d) for d in range(2 * side - 1)]


def decoding_steps(counts: Sequence[int]) -> list[DecodingStep]:
    """The steps that draw ``counts`` tokens: each begins with the inputs that the step before did not leave in the cache."""
    steps, first, start = [], 0, 0
    for count in counts:
        steps.append(DecodingStep(start, first, count))
        start, first = first + 1, first + count
    return steps
