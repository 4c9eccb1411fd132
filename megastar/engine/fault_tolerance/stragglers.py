"""Finds stragglers. In synchronous training all ranks' steps take equally long, so each rank measures its own work.

This must exclude the waiting for other ranks, which collectives inside the forward pass (ZeRO-3, tensor parallelism)
cause. On a CPU it is the thread's processor time between the arrival of a batch and the reduction after the forward pass:
waiting takes none. On a GPU the host's kernel launches are timed between the same two points, and CUDA events measure a
part of the network without communication: one block, or, where blocks communicate, one linear layer. Nothing is
synchronised; the results travel in one small gather per row of metrics.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from megastar.engine.rank_sync import gather
from megastar.parallel.collectives import gather_rows
from megastar.utils.hostname import host_name
from megastar.utils.launcher import place_of

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.context import Context
    from megastar.engine.input_pipeline.batch_fetcher import BatchFetcher
    from megastar.engine.zero.engines import Engines
    from megastar.model.transformer import Transformer

ROWS = 5  # consecutive rows after which a rank counts as slow, and as recovered


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    gpu: int | None

    def __str__(self) -> str:
        return self.host if self.gpu is None else f"{self.host} (GPU {self.gpu})"


class StragglerReport(NamedTuple):
    """One row's."""

    own: list[float]  # each rank's own work in seconds per step, including its waiting for data
    ratios: list[float]  # of each rank's own work to the median of the others'
    data: list[bool]  # whether waiting for data, not computing, makes the difference


def compare_ranks(table: list[list[float]], step_s: float) -> StragglerReport:
    """``table``: (world, 3) seconds per step of host work, the timed part of the network on the GPU (0: no GPU), and
    waiting for data. The slowest GPU is busy for the whole ``step_s`` seconds; the others in proportion to their part.
    """
    host, part, wait = (list(column) for column in zip(*table, strict=True))
    longest = max(part)
    if longest > 0 and min(part) > 0:
        usual = statistics.median(host)
        busy = max(0.0, step_s - max(wait))
        work = [busy * p / longest + max(0.0, h - usual) for h, p in zip(host, part, strict=True)]
    else:
        work = host
    own = [a + b for a, b in zip(work, wait, strict=True)]
    ratios, data = [], []
    for rank in range(len(table)):
        others = [r for r in range(len(table)) if r != rank] or [rank]
        usual = statistics.median(own[r] for r in others)
        ratios.append(own[rank] / usual if usual > 0 else 1.0)
        more = [values[rank] - statistics.median(values[r] for r in others) for values in (work, wait)]
        data.append(more[1] > max(0.0, more[0]))
    return StragglerReport(own, ratios, data)


@dataclass
class StragglerTracker:
    """Reports a host when one of its ranks was slow in ``ROWS`` consecutive rows, and again when it has recovered."""

    places: list[Place]
    slow_ratio: float

    def __post_init__(self) -> None:
        self.slow = [0] * len(self.places)  # consecutive rows, of each rank
        self.normal = [0] * len(self.places)
        self.reported: set[str] = set()

    def update(self, report: StragglerReport) -> list[tuple[str, dict[str, Any]]]:
        """New events: sentences, each with further fields."""
        if not self.slow_ratio:
            return []
        news = []
        for rank, ratio in enumerate(report.ratios):
            late = ratio >= self.slow_ratio
            self.slow[rank], self.normal[rank] = (self.slow[rank] + 1, 0) if late else (0, self.normal[rank] + 1)
        for rank in sorted(range(len(self.places)), key=lambda r: -report.ratios[r]):
            place = self.places[rank]
            if self.slow[rank] >= ROWS and place.host not in self.reported:
                self.reported.add(place.host)
                news.append(self._event(rank, report))
        for host in sorted(self.reported):
            if all(n >= ROWS for n, place in zip(self.normal, self.places, strict=True) if place.host == host):
                self.reported.remove(host)
                news.append((f"{host} is as fast as the others again", {"situation": f"slow {host}", "over": True}))
        return news

    def _event(self, rank: int, report: StragglerReport) -> tuple[str, dict[str, Any]]:
        place, why = self.places[rank], "compute"
        what, remedy = "computes slowly", f"run megastar doctor on {place.host}"
        if report.data[rank]:
            why, what = "data", "waits for its data"
            remedy = f"check the disk and network of {place.host} (megastar doctor)"
        text = (
            f"rank {rank} on {place} {what}: {report.own[rank]:.3g} s per step, {report.ratios[rank]:.2g} times the "
            f"others' in {ROWS} consecutive rows, and all ranks wait for it: {remedy}; if that does not help, exclude it"
        )
        more = {"rank": rank, "slow_host": place.host, "gpu": place.gpu, "why": why}
        return text, {"situation": f"slow {place.host}", **more, "ratio": round(report.ratios[rank], 3)}


class Stragglers:
    """Call ``row`` for each row of metrics. Collective, as is the construction."""

    def __init__(self, ctx: Context, engines: Engines, fetcher: BatchFetcher, slow_ratio: float):
        self.ctx, self.fetcher = ctx, fetcher
        # With a GPU per SLURM task the device's own index is always 0.
        gpu = (place_of(os.environ).local or ctx.device.index or 0) if ctx.device.type == "cuda" else None
        self.tracker = StragglerTracker([Place(*p) for p in gather(ctx, (host_name(), gpu))], slow_ratio)
        fetcher.timer.sample(comm_free_module(engines, ctx))
        self._since = time.perf_counter()

    def row(self, steps: int) -> tuple[dict[str, float], list[tuple[str, dict[str, Any]]]]:
        """The metrics of the last ``steps`` steps, and the events: sentences, each with further fields."""
        steps = max(1, steps)
        now = time.perf_counter()
        step_s, self._since = (now - self._since) / steps, now
        host, part = self.fetcher.timer.take()
        mine = torch.tensor([host / steps, part, self.fetcher.loader.waited() / steps], device=self.ctx.device)
        rows = gather_rows(mine.view(1, -1), dist.group.WORLD if self.ctx.world > 1 else None).tolist()
        row, events = {"data_wait_s": max(r[2] for r in rows)}, []
        if self.ctx.world > 1:
            report = compare_ranks(rows, step_s)
            events = self.tracker.update(report)
            slowest = max(range(self.ctx.world), key=report.ratios.__getitem__)
            row |= {"slowest_rank": slowest, "slowest_ratio": report.ratios[slowest]}
        return row, events


def comm_free_module(engines: Engines, ctx: Context) -> torch.nn.Module:
    """A part of the student whose forward pass does not communicate, once its weights are gathered."""
    transformer: Transformer = engines.student.module.transformer
    block: Any = transformer.layers[len(transformer.layers) // 2]
    part: torch.nn.Module = block
    if engines.student.zero_optimization_stage() == 3 or ctx.tensor > 1:
        compiled = "forward" in vars(block)  # hooks inside a compiled block do not run
        part = transformer.norm if compiled else block.feed_forward.w1
    return part
