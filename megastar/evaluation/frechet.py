"""Frechet distance of two Gaussians, in float64, by symmetric eigenvalues: no matrix square root, which may fail."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megastar.errors import UserError


class Statistics:
    """Mean and covariance of feature vectors, accumulated over batches and ranks in float64.

    Holds the count, the mean (F,) and the scatter, sum of (x - mean)(x - mean)^T (F, F). Batches and parts are combined
    by the pairwise update of Chan, Golub and LeVeque (1979), which never subtracts large sums.
    """

    def __init__(self, count: int = 0, mean: np.ndarray | None = None, scatter: np.ndarray | None = None) -> None:
        self.count = count
        self.mean = np.zeros(0) if mean is None else mean
        self.scatter = np.zeros((0, 0)) if scatter is None else scatter
        self._covariance: np.ndarray | None = None  # a published one

    @classmethod
    def given(cls, mean: np.ndarray, covariance: np.ndarray) -> Statistics:
        """From a published mean (F,) and unbiased covariance (F, F), without a count."""
        s = cls(0, mean.astype(np.float64))
        s._covariance = covariance.astype(np.float64)
        return s

    @property
    def covariance(self) -> np.ndarray:
        """(F, F) float64, unbiased. Raises ``UserError`` for fewer than 2 vectors."""
        if self._covariance is not None:
            return self._covariance
        if self.count < 2:
            raise UserError(f"{self.count} feature vectors: a covariance requires at least 2")
        return self.scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> Statistics:
        """Add feature vectors (B, F). Raises ``UserError`` for NaN and infinity."""
        if not len(features):
            return self
        x = features.astype(np.float64)
        if not np.isfinite(x).all():
            raise UserError("features contain NaN or infinity: check the feature network's weights and precision")
        mean = x.mean(0)
        x -= mean
        return self.merge(Statistics(len(x), mean, x.T @ x))

    def merge(self, other: Statistics) -> Statistics:
        """Add the vectors of ``other``."""
        assert self._covariance is None, "published statistics have no count to merge by"
        if not other.count:
            return self
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean.copy(), other.scatter.copy()
            return self
        total = self.count + other.count
        step = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.multiply.outer(step * (self.count * other.count / total), step)
        self.mean = self.mean + step * (other.count / total)
        self.count = total
        return self

    def all_reduce(self, group: dist.ProcessGroup, dim: int, device: torch.device | str = "cpu") -> Statistics:
        """Combine the vectors of all ranks of ``group``, on each rank. ``dim`` is F: a rank may have no vectors."""
        mean = self.mean if self.count else np.zeros(dim)
        scatter = self.scatter if self.count else np.zeros((dim, dim))
        first = torch.tensor([*(mean * self.count), self.count], dtype=torch.float64, device=device)
        dist.all_reduce(first, group=group)
        count = int(first[-1])
        total = (first[:-1] / max(1, count)).cpu().numpy()  # (F,) the mean over all ranks
        scatter = scatter + self.count * np.multiply.outer(mean - total, mean - total)
        second = torch.from_numpy(scatter).to(device)
        dist.all_reduce(second, group=group)
        self.count, self.mean, self.scatter = count, total, second.cpu().numpy()
        return self


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    With C_a = L L^T, C_a C_b has the eigenvalues of the symmetric L^T C_b L, whose roots sum to the last trace. A small
    negative distance of equal inputs, due to rounding, is set to 0. Raises ``UserError`` if it is not finite.
    """
    first, second = a.covariance, b.covariance
    assert first.shape == second.shape, f"features of {len(first)} and of {len(second)} dimensions"
    damaged = "check the feature network, the images and the reference, and remove the cache of features"
    for number, mean, covariance in (1, a.mean, first), (2, b.mean, second):
        if np.isfinite(mean).all() and np.isfinite(covariance).all():
            continue
        raise UserError(f"the statistics of set {number} of a Frechet distance contain NaN or infinity: {damaged}")
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            root = _root(first)
            product = np.linalg.eigvalsh(root.T @ second @ root).clip(0)
        except np.linalg.LinAlgError as error:
            raise UserError(f"a Frechet distance cannot be computed ({error}): {damaged}") from error
        difference = a.mean - b.mean
        distance = float(difference @ difference + np.trace(first) + np.trace(second) - 2 * np.sqrt(product).sum())
    if not np.isfinite(distance):
        raise UserError(f"a Frechet distance is {distance}, because its features are too large: {damaged}")
    return max(0.0, distance)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (F, F) with R R^T = ``covariance``."""
    try:
        return np.linalg.cholesky(covariance)  # a twentieth of the time of eigenvectors
    except np.linalg.LinAlgError:  # fewer images than features
        values, vectors = np.linalg.eigh(covariance)
        root: np.ndarray = vectors * np.sqrt(values.clip(0))
        return root


def finite_sample_floor(features: np.ndarray, seed: int = 0) -> tuple[float, int]:
    """Distance between two disjoint random halves of one set, and the size of a half.

    A perfect generator with as many samples as one half would score about this value, not 0.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    first, second = (Statistics().update(features[order[i * half : (i + 1) * half]]) for i in range(2))
    return frechet_distance(first, second), half
