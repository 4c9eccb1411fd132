"""Frechet distance of two Gaussians, in float64, by symmetric eigenvalues: no matrix square root that may fail."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    mean: np.ndarray  # (F,) float64
    covariance: np.ndarray  # (F, F) float64, unbiased
    count: int


def statistics(features: np.ndarray) -> Statistics:
    """Features (N, F) -> mean and covariance in float64. N must be at least 2; non-finite features raise ``ValueError``."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} feature vectors: a covariance needs at least 2")
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity")
    mean = x.mean(0)
    x -= mean
    return Statistics(mean, x.T @ x / (len(x) - 1), len(x))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), whose roots sum to the last trace. Rounding
    can leave a tiny negative distance for equal inputs, which is cut to 0.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # (F, F)
    product = np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(product).sum()
    return max(0.0, float(distance))


def finite_sample_floor(features: np.ndarray, seed: int = 0) -> tuple[float, int]:
    """Distance between two disjoint random halves of one set, and the size of a half.

    A perfect generator that drew as many pictures as a half would score about this, not 0.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    first, second = (statistics(features[order[i * half : (i + 1) * half]]) for i in range(2))
    return frechet_distance(first, second), half
