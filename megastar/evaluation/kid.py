"""Kernel distance (Binkowski et al. 2018): squared MMD with a cubic kernel, unbiased, averaged over random subsets."""

from __future__ import annotations

import numpy as np


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x . y / F + 1)^3 of features (N, F), (M, F): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of two sets (n, F) of equal size, in float64; may be slightly negative."""
    n = len(x)
    xx, yy = (kernel(v, v) for v in (x, y))
    same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(same - 2 * kernel(x, y).mean())


def kernel_distance(
    real: np.ndarray, made: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over ``subsets`` pairs of random subsets of ``size`` features (N, F)."""
    assert 2 <= size <= min(len(real), len(made)), f"subsets of {size} from {len(real)} and {len(made)}"
    rng = np.random.default_rng(seed)

    def subset(x: np.ndarray) -> np.ndarray:
        return x[rng.choice(len(x), size, replace=False)].astype(np.float64)

    values = [mmd2(subset(real), subset(made)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))
