"""Frechet distance of two Gaussians, in float64, by symmetric eigenvalues: no matrix square root that may fail."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megastar.errors import UserError


class Statistics:
    """Mean and covariance of feature vectors, gathered batch by batch and rank by rank in float64.

    Holds the count, the mean (F,) and the scatter, sum of (x - mean)(x - mean)^T (F, F). Batches and parts are joined
    by the pairwise update of Chan, Golub and LeVeque (1979), which never subtracts large sums from each other.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self.scatter = np.zeros((0, 0))

    @classmethod
    def given(cls, mean: np.ndarray, covariance: np.ndarray, count: int = 0) -> Statistics:
        """From a published mean (F,) and unbiased covariance (F, F). ``count`` 0: not known."""
        s = cls()
        s.count, s.mean = count, mean.astype(np.float64)
        s._covariance, s.scatter = covariance.astype(np.float64), covariance.astype(np.float64) * max(0, count - 1)
        return s

    @property
    def covariance(self) -> np.ndarray:
        """(F, F) float64, unbiased. Raises ``UserError`` for fewer than 2 vectors."""
        if hasattr(self, "_covariance"):
            return self._covariance
        if self.count < 2:
            raise UserError(f"{self.count} feature vectors: a covariance needs at least 2")
        return self.scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> Statistics:
        """Add feature vectors (B, F). Raises ``UserError`` for NaN and infinity."""
        if not len(features):
            return self
        x = features.astype(np.float64)
        if not np.isfinite(x).all():
            raise UserError("features hold NaN or infinity: the network's weights or its precision are broken")
        part = Statistics()
        part.count, part.mean = len(x), x.mean(0)
        x -= part.mean
        part.scatter = x.T @ x
        return self.merge(part)

    def merge(self, other: Statistics) -> Statistics:
        """Add what ``other`` has seen."""
        assert not hasattr(self, "_covariance") or self.count > 1, "published statistics have no count to merge by"
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

    def all_reduce(self, group: dist.ProcessGroup | None, dim: int, device: torch.device | str = "cpu") -> Statistics:
        """What all ranks of ``group`` have seen, on each of them. ``dim`` is F: a rank may have seen nothing."""
        if group is None:
            return self
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


def statistics(features: np.ndarray) -> Statistics:
    """Features (N, F) -> their statistics."""
    return Statistics().update(features)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    With C_a = L L^T, C_a C_b has the eigenvalues of the symmetric L^T C_b L, whose roots sum to the last trace. Rounding
    can leave a tiny negative distance for equal inputs, which is cut to 0.
    """
    first, second = a.covariance, b.covariance
    assert first.shape == second.shape, f"features of {len(first)} and of {len(second)} numbers"
    try:
        root = np.linalg.cholesky(first)  # a twentieth of the time of eigenvectors
    except np.linalg.LinAlgError:  # fewer pictures than features
        values, vectors = np.linalg.eigh(first)
        root = vectors * np.sqrt(values.clip(0))  # (F, F)
    product = np.linalg.eigvalsh(root.T @ second @ root).clip(0)
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(first) + np.trace(second) - 2 * np.sqrt(product).sum()
    return max(0.0, float(distance))


def finite_sample_floor(features: np.ndarray, seed: int = 0) -> tuple[float, int]:
    """Distance between two disjoint random halves of one set, and the size of a half.

    A perfect generator that drew as many pictures as a half would score about this, not 0.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    first, second = (statistics(features[order[i * half : (i + 1) * half]]) for i in range(2))
    return frechet_distance(first, second), half
