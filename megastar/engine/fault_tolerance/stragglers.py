"""Who holds the others up. In synchronous training all ranks' steps take equally long, so each measures its own work.

A rank's own work must not hold the waiting for others, which collectives inside the forward pass (ZeRO-3, tensor
parallelism) do. On a CPU it is the thread's processor time between a batch's arrival and the reduction behind the
forward pass: who waits takes none. On a GPU the host's launching is timed between the same two points, where it waits
for nobody, and CUDA events measure a part of the network that sends nothing: one block, or, where blocks send, one
linear layer. Nothing is synchronised, and one small gather a row of metrics tells everybody.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from megastar.utils.hostname import host_name

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.context import Context
    from megastar.engine.input_pipeline.batch_fetcher import BatchFetcher
    from megastar.engine.zero.engines import Engines

ROWS = 5  # in a row that a rank must be slow before it is named, and in step again before that is over


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    gpu: int | None

    def __str__(self) -> str:
        return self.host if self.gpu is None else f"{self.host} (GPU {self.gpu})"


class StragglerReport(NamedTuple):
    """One row's."""

    own: list[float]  # seconds a step of each rank's own work, its waiting for data included
    ratios: list[float]  # of each rank's to the median of all others'
    data: list[bool]  # whether it is the data, not the work, that makes the difference


def compare_ranks(table: list[list[float]], step_s: float) -> StragglerReport:
    """``table``: (world, 3) seconds a step of host, part of the network on the GPU (0: none), waiting for data.

    A step of ``step_s`` seconds is the slowest GPU's busy time; the others' is shorter as their part was.
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
    """Names a host when a rank of it was slow ``ROWS`` rows in a row, and once more when that is over."""

    places: list[Place]
    slow_ratio: float

    def __post_init__(self) -> None:
        self.slow = [0] * len(self.places)  # rows in a row, of each rank
        self.well = [0] * len(self.places)
        self.named: set[str] = set()

    def see(self, verdict: StragglerReport) -> list[tuple[str, dict[str, Any]]]:
        """Sentences, with further fields each."""
        if not self.slow_ratio:
            return []
        news = []
        for rank, ratio in enumerate(verdict.ratios):
            late = ratio >= self.slow_ratio
            self.slow[rank], self.well[rank] = (self.slow[rank] + 1, 0) if late else (0, self.well[rank] + 1)
        for rank in sorted(range(len(self.places)), key=lambda r: -verdict.ratios[r]):
            place = self.places[rank]
            if self.slow[rank] >= ROWS and place.host not in self.named:
                self.named.add(place.host)
                news.append((self._sentence(rank, verdict), self._fields(rank, verdict)))
        for host in sorted(self.named):
            if all(n >= ROWS for n, place in zip(self.well, self.places, strict=True) if place.host == host):
                self.named.remove(host)
                news.append((f"{host} is as fast as the others again", {"situation": f"slow {host}", "over": True}))
        return news

    def _sentence(self, rank: int, verdict: StragglerReport) -> str:
        place = self.places[rank]
        if verdict.data[rank]:
            what, remedy = "waits for its data", f"see the disk and the network of {place.host} (megastar doctor)"
        else:
            what, remedy = "computes slowly", f"run megastar doctor on {place.host}"
        return (
            f"rank {rank} on {place} {what}: {verdict.own[rank]:.3g} s a step of its own, {verdict.ratios[rank]:.2g} "
            f"times the others', {ROWS} rows in a row; all wait for it: {remedy}; if that does not help, exclude it"
        )

    def _fields(self, rank: int, verdict: StragglerReport) -> dict[str, Any]:
        place, why = self.places[rank], "data" if verdict.data[rank] else "compute"
        more = {"rank": rank, "slow_host": place.host, "gpu": place.gpu, "why": why}
        return {"situation": f"slow {place.host}", **more, "ratio": round(verdict.ratios[rank], 3)}


class Stragglers:
    """``row`` at each row of metrics, on all ranks. Collective, as is the construction."""

    def __init__(self, ctx: Context, engines: Engines, supply: BatchFetcher, slow_ratio: float):
        self.ctx, self.supply = ctx, supply
        gpu = int(os.environ.get("SLURM_LOCALID", ctx.device.index or 0)) if ctx.device.type == "cuda" else None
        mine = Place(host_name(), gpu)
        places = [mine]
        if ctx.world > 1:
            places = [mine] * ctx.world
            dist.all_gather_object(places, mine)
        self.watch = StragglerTracker(places, slow_ratio)
        supply.timer.sample(comm_free_module(engines, ctx))
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._since = time.perf_counter()

    def row(self, steps: int) -> dict[str, float]:
        """What the metrics say of the last ``steps`` steps; ``news`` has what the events say."""
        steps = max(1, steps)
        now = time.perf_counter()
        step_s, self._since = (now - self._since) / steps, now
        host, part = self.supply.timer.take()
        mine = torch.tensor([host / steps, part, self.supply.waited() / steps], device=self.ctx.device)
        table = mine
        if self.ctx.world > 1:
            table = mine.new_empty(self.ctx.world * len(mine))
            dist.all_gather_into_tensor(table, mine)
        rows = table.view(self.ctx.world, len(mine)).tolist()
        row = {"data_wait_s": max(r[2] for r in rows)}
        if self.ctx.world > 1:
            verdict = compare_ranks(rows, step_s)
            self._news = self.watch.see(verdict)
            slowest = max(range(self.ctx.world), key=verdict.ratios.__getitem__)
            row |= {"slowest_rank": slowest, "slowest_ratio": verdict.ratios[slowest]}
        return row

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Sentences for the events of the last row, with further fields each."""
        news, self._news = self._news, []
        return news


def comm_free_module(engines: Engines, ctx: Context) -> torch.nn.Module:
    """A part of the student whose forward pass sends nothing, once its weights are there."""
    transformer = engines.student.module.transformer
    block = transformer.layers[len(transformer.layers) // 2]
    if block._compiled_call_impl is not None:  # its hooks do not run; blocks that send are not compiled
        return transformer  # type: ignore[no-any-return]
    if engines.student.zero_optimization_stage() < 3 and ctx.tensor == 1:
        return block  # type: ignore[no-any-return]
    return block.feed_forward.w1  # type: ignore[no-any-return]
