"""Draws for a sample: which crops, and whether its label is dropped.

Each is a function of (seed, epoch, sample id), so it is the same whatever the ranks, workers and batch.
"""

from __future__ import annotations

import numpy as np

_VIEWS, _LABEL_DROP = 1, 2  # streams: the draws are independent of each other
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bits(seed: int, stream: int, epochs: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """(B,), (B,) -> n random uint64 a sample, (B, n)."""
    words = [
        np.uint64(seed & (2**64 - 1)),
        np.uint64(stream),
        epochs.astype(np.uint64)[:, None],
        ids.astype(np.uint64)[:, None],
    ]
    state = np.zeros((len(ids), n), np.uint64)
    for word in [*words, np.arange(n, dtype=np.uint64)]:
        state = _mix((state + _GOLDEN) ^ word)
    return _mix(state + _GOLDEN)


def draw_views(seed: int, epochs: np.ndarray, ids: np.ndarray, stored: int, M: int) -> np.ndarray:
    """``M`` distinct stored views a sample: (B,), (B,) -> (B, M) int64 in random order."""
    assert stored >= M, (stored, M)
    return np.argsort(_bits(seed, _VIEWS, epochs, ids, stored), axis=1, kind="stable")[:, :M]


def draw_label_drop(seed: int, epochs: np.ndarray, ids: np.ndarray, prob: float) -> np.ndarray:
    """Whether the sample trains with the null class: (B,), (B,) -> (B,) bool, true with probability ``prob``."""
    uniform = (_bits(seed, _LABEL_DROP, epochs, ids, 1)[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform < prob
