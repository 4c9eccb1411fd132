"""Random draws for a sample: its crops, and whether its label is dropped.

Each is a function of (seed, epoch, sample id), independent of ranks, workers and batch size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_VIEWS, _LABEL_DROP = 1, 2  # independent random streams
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014), in place: every bit depends on every bit."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x ^= x >> shift
        x *= factor
    x ^= x >> _SHIFTS[2]
    return x


@lru_cache(maxsize=16)
def _key(seed: int, stream: int) -> np.ndarray:
    """The hash of the words common to all samples, (1,)."""
    state = np.zeros(1, np.uint64)
    for word in (seed & (2**64 - 1), stream):
        state = _mix((state + _GOLDEN) ^ np.uint64(word))
    return state


def random_bits(seed: int, stream: int, epochs: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """(B,), (B,) -> n random uint64 per sample, (B, n). A hash of the words seed, stream, epoch, id, number."""
    state = (_key(seed, stream) + _GOLDEN) ^ epochs.astype(np.uint64)
    state = _mix(state)
    state += _GOLDEN
    state ^= ids.astype(np.uint64)
    state = _mix(state)
    state += _GOLDEN
    words = _mix(state[:, None] ^ np.arange(n, dtype=np.uint64))  # (B, n)
    words += _GOLDEN
    return _mix(words)


def draw_views(seed: int, epochs: np.ndarray, ids: np.ndarray, stored: int, M: int) -> np.ndarray:
    """``M`` distinct stored views per sample: (B,), (B,) -> (B, M) int64 in random order."""
    assert stored >= M, (stored, M)
    bits = random_bits(seed, _VIEWS, epochs, ids, stored)
    if M > 2 or stored < 4:
        return np.argsort(bits, axis=1, kind="stable")[:, :M]
    # The smallest ones without a sort.
    views, rows = np.empty((len(bits), M), np.int64), np.arange(len(bits))
    for m in range(M):
        views[:, m] = bits.argmin(axis=1)
        bits[rows, views[:, m]] = ~np.uint64(0)
    return views


def draw_label_drop(seed: int, epochs: np.ndarray, ids: np.ndarray, prob: float) -> np.ndarray:
    """Whether the sample trains with the null class: (B,), (B,) -> (B,) bool, true with probability ``prob``."""
    uniform = (random_bits(seed, _LABEL_DROP, epochs, ids, 1)[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform < prob
