"""Features of many images, collected by batches and ranks: their statistics, and the features if a metric needs them.

A sampler can feed its images as it samples them, so images need not be written to be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megastar.evaluation.features import Network
from megastar.evaluation.frechet import Statistics
from megastar.parallel.collectives import gather_rows
from megastar.utils.progress_bar import progress_bar

BUFFER = 1024  # feature vectors added to the statistics at once: less memory traffic than batch by batch


class Collector:
    """Collects features of uint8 images. ``keep``: keep them (N x F x 4 bytes); ``spatial``: also sFID's statistics.

    ``stats`` and ``spatial_stats`` are float64; read them after ``finish``.
    """

    def __init__(self, network: Network, *, keep: bool = False, spatial: bool = False):
        assert not spatial or network.spatial_dim
        self.network, self.keep, self.spatial = network, keep, spatial
        self.count, self.dim, self.side = 0, 0, 0
        self.stats, self.spatial_stats = Statistics(), Statistics()
        self._pending: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._kept: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def update(self, pixels: np.ndarray | Tensor, ids: np.ndarray | Tensor | None = None) -> None:
        """Images uint8 (B, H, W, 3). ``ids`` (B,) are their indices in the set (default: the order of the calls).

        The Inception Score's splits follow the ids, so pass them if several ranks share a set.
        """
        assert pixels.ndim == 4 and pixels.shape[-1] == 3, f"images are {tuple(pixels.shape)}, expected (B, H, W, 3)"
        images = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
        assert images.dtype == torch.uint8, f"images are {images.dtype}, expected uint8"
        features, spatial = self.network(images, self.spatial)
        pool = features.float().cpu().numpy()
        self._pending.append((pool, spatial.float().cpu().numpy() if spatial is not None else None))
        if self.keep:
            self._kept.append(pool)
            ids = np.arange(self.count, self.count + len(pool)) if ids is None else np.asarray(ids)
            self._ids.append(ids.astype(np.int64))
        self.count, self.dim, self.side = self.count + len(pool), pool.shape[1], images.shape[1]
        if sum(len(p) for p, _ in self._pending) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Add the pending features to the statistics. Raises ``UserError`` for NaN and infinity."""
        if self._pending:
            self.stats.update(np.concatenate([p for p, _ in self._pending]))
            if self.spatial:
                self.spatial_stats.update(np.concatenate([s for _, s in self._pending if s is not None]))
            self._pending = []

    def finish(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Collector:
        """Combine the features of all ranks of ``group``, on each rank; ``device`` must suit the group's backend."""
        self.flush()
        if group is None:
            return self
        sizes = gather_rows(torch.tensor([[self.dim, self.count]], device=device), group).cpu()  # (ranks, 2)
        self.dim = int(sizes[:, 0].max())
        self.stats.all_reduce(group, self.dim, device)
        if self.spatial:
            self.spatial_stats.all_reduce(group, self.network.spatial_dim, device)
        if self.keep:
            counts, longest = sizes[:, 1].tolist(), int(sizes[:, 1].max())
            padded = torch.zeros(longest, self.dim, device=device)
            padded_ids = torch.zeros(longest, dtype=torch.int64, device=device)
            if self.count:
                padded[: self.count] = torch.from_numpy(np.concatenate(self._kept)).to(device)
                padded_ids[: self.count] = torch.from_numpy(np.concatenate(self._ids)).to(device)
            rows = [slice(r * longest, r * longest + n) for r, n in enumerate(counts)]
            features, ids = (gather_rows(x, group).cpu().numpy() for x in (padded, padded_ids))
            self._kept, self._ids = [features[r] for r in rows], [ids[r] for r in rows]
        self.count = int(sizes[:, 1].sum())
        return self

    @property
    def features(self) -> np.ndarray:
        """(N, F) fp32 in the order of the ids."""
        assert self.keep
        return np.concatenate(self._kept)[np.argsort(np.concatenate(self._ids), kind="stable")]

    # The cache of a real set ------------------------------------------------------------------------------------
    def arrays(self) -> dict[str, np.ndarray]:
        """The state, for ``restore``."""
        out = {"count": np.array([self.count]), "mean": self.stats.mean, "scatter": self.stats.scatter}
        if self.spatial:
            out |= {"spatial_mean": self.spatial_stats.mean, "spatial_scatter": self.spatial_stats.scatter}
        return out | ({"features": self.features} if self.keep else {})

    def restore(self, arrays: dict[str, np.ndarray]) -> Collector:
        """Load the state returned by ``arrays``. Raises ``KeyError`` or ``ValueError`` for other contents."""
        self.count, self.dim = int(arrays["count"].item()), arrays["mean"].size
        kinds = [("mean", "scatter")] + ([("spatial_mean", "spatial_scatter")] if self.spatial else [])
        shapes = [arrays[scatter].shape == 2 * arrays[mean].shape for mean, scatter in kinds]
        if not all(shapes) or (self.keep and arrays["features"].shape != (self.count, self.dim)):
            raise ValueError("the shapes differ")
        self.stats = Statistics(self.count, arrays["mean"], arrays["scatter"])
        if self.spatial:
            self.spatial_stats = Statistics(self.count, arrays["spatial_mean"], arrays["spatial_scatter"])
        if self.keep:
            self._kept, self._ids = [arrays["features"]], [np.arange(self.count)]
        return self


def collect(
    collector: Collector,
    batches: Iterable[np.ndarray],
    total: int,
    title: str,
    console: Console | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Collector:
    """Feed all ``batches`` with a progress bar, then finish. ``on_batch`` is called before each."""
    with progress_bar(console, f"features {title}", total) as bar:
        for batch in batches:
            on_batch()
            collector.update(batch)
            bar.advance(len(batch), f"{bar.rate:.1f} images/s")
    return collector.finish()
