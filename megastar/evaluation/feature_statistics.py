"""Features of many pictures, batch by batch and rank by rank: their statistics, and themselves where a metric needs them.

This is what a sampler feeds while it draws, so that no picture need be written to be scored.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megastar.evaluation.features import Network
from megastar.evaluation.frechet import Statistics
from megastar.parallel.collectives import gather_rows

BUFFER = 1024  # feature vectors that are added to the statistics at once: less traffic than batch by batch


class Collector:
    """Feed it uint8 pictures. ``keep``: hold the features (N x F x 4 bytes); ``spatial``: sFID's statistics too.

    ``stats`` and ``spatial_stats`` are float64; read them after ``finish``.
    """

    def __init__(self, network: Network, *, keep: bool = False, spatial: bool = False):
        assert not spatial or network.spatial_dim
        self.network, self.keep, self.spatial = network, keep, spatial
        self.count, self.dim, self.side = 0, 0, 0
        self.stats, self.spatial_stats = Statistics(), Statistics()
        self._waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._kept: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def update(self, pixels: np.ndarray | Tensor, ids: np.ndarray | Tensor | None = None) -> None:
        """Pictures uint8 (B, H, W, 3). ``ids`` (B,) are their places in the set (default: the order of arrival).

        The Inception Score's splits follow the ids, so give them where several ranks share a set.
        """
        assert pixels.ndim == 4 and pixels.shape[-1] == 3, f"pictures are {tuple(pixels.shape)}, expected (B, H, W, 3)"
        some = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
        assert some.dtype == torch.uint8, f"pictures are {some.dtype}, expected uint8"
        features, spatial = self.network(some, self.spatial)
        pool = features.float().cpu().numpy()
        self._waiting.append((pool, spatial.float().cpu().numpy() if spatial is not None else None))
        if self.keep:
            self._kept.append(pool)
            places = np.arange(self.count, self.count + len(pool)) if ids is None else np.asarray(ids)
            self._ids.append(places.astype(np.int64))
        self.count, self.dim, self.side = self.count + len(pool), pool.shape[1], some.shape[1]
        if sum(len(p) for p, _ in self._waiting) >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self.stats.update(np.concatenate([p for p, _ in self._waiting]))
            if self.spatial:
                self.spatial_stats.update(np.concatenate([s for _, s in self._waiting if s is not None]))
            self._waiting = []

    def finish(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Collector:
        """Join what all ranks of ``group`` have seen, on each of them; ``device`` suits the group's backend."""
        self._flush()
        if group is None:
            return self
        about = torch.tensor([self.dim, self.count], device=device)
        known = gather_rows(about[None], group).cpu()  # (ranks, 2)
        self.dim = int(known[:, 0].max())
        self.stats.all_reduce(group, self.dim, device)
        if self.spatial:
            self.spatial_stats.all_reduce(group, self.network.spatial_dim, device)
        if self.keep:
            counts, longest = known[:, 1].tolist(), int(known[:, 1].max())
            padded = torch.zeros(longest, self.dim, device=device)
            places = torch.zeros(longest, dtype=torch.int64, device=device)
            if self.count:
                padded[: self.count] = torch.from_numpy(np.concatenate(self._kept)).to(device)
                places[: self.count] = torch.from_numpy(np.concatenate(self._ids)).to(device)
            rows = [slice(r * longest, r * longest + n) for r, n in enumerate(counts)]
            every, ids = (gather_rows(x, group).cpu().numpy() for x in (padded, places))
            self._kept, self._ids = [every[r] for r in rows], [ids[r] for r in rows]
        self.count = int(known[:, 1].sum())
        return self

    @property
    def features(self) -> np.ndarray:
        """(N, F) fp32 in the order of the ids."""
        assert self.keep
        return np.concatenate(self._kept)[np.argsort(np.concatenate(self._ids), kind="stable")]

    # The cache of a real set ------------------------------------------------------------------------------------
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything ``restore`` needs."""
        out = {"count": np.array([self.count]), "mean": self.stats.mean, "scatter": self.stats.scatter}
        if self.spatial:
            out |= {"spatial_mean": self.spatial_stats.mean, "spatial_scatter": self.spatial_stats.scatter}
        return out | ({"features": self.features} if self.keep else {})

    def restore(self, arrays: dict[str, np.ndarray]) -> Collector:
        """Take up what ``arrays`` returned. Raises ``KeyError`` when something is missing."""
        self.count, self.dim = int(arrays["count"][0]), len(arrays["mean"])
        self.stats.count, self.stats.mean, self.stats.scatter = self.count, arrays["mean"], arrays["scatter"]
        if self.spatial:
            s = self.spatial_stats
            s.count, s.mean, s.scatter = self.count, arrays["spatial_mean"], arrays["spatial_scatter"]
        if self.keep:
            self._kept, self._ids = [arrays["features"]], [np.arange(self.count)]
        return self


def collect(
    collector: Collector, batches: Iterable[np.ndarray], total: int, title: str, console: Console | None = None
) -> Collector:
    """Feed all ``batches`` with a progress bar, and finish."""
    columns = (
        TextColumn(f"features {title}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=total, rate="")
        for some in batches:
            collector.update(some)
            speed = bar.tasks[0].speed
            bar.update(task, advance=len(some), rate=f"{speed:.1f} pictures/s" if speed else "")
    return collector.finish()
