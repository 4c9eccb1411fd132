"""The batches of the loop, and what happens when a rank has none: every rank must still meet the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.data.loader import TokenLoader
from megastar.data.prefetch import GaveUp
from megastar.engine.context import Context
from megastar.engine.input_pipeline.compute_timer import ComputeTimer
from megastar.engine.input_pipeline.wait_reporter import WaitReporter
from megastar.engine.phase import DATA, PHASE
from megastar.engine.rank_sync import _problem_of_any


@dataclass
class OutOfData(Exception):
    """Some rank has no batch for this step, as all ranks know: the run ends behind the step before."""

    signal: int  # the stop signal, if one was the reason to wait no longer


class BatchFetcher:
    """This rank's micro-batches.

    A rank that waits for data while a stop signal is there, or whose reading failed, must not leave: the others are in
    the step's collectives already. It goes on with a stand-in of zeros, and ``dry`` tells them so in the one reduction
    that each micro-batch ends in. Nothing of such a step moves a weight; ``rewind`` takes back the dropout's draws.

    A long wait is told in the events of ``run``.
    """

    def __init__(self, loader: TokenLoader, ctx: Context, stop: Callable[[], bool], run: Path):
        self.loader, self.ctx = loader, ctx
        self.own = ComputeTimer(ctx.device)
        self.dry = False
        self.problem: Exception | None = None
        self._stop, self.waits = stop, WaitReporter(loader, ctx, run)
        self._random: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """Go on where the loader stands."""
        self._batches = self.loader.batches(give_up=self._poll)

    def begin_step(self) -> None:
        """Remember the generators, a few microseconds."""
        self._random = [torch.get_rng_state()]
        if self.ctx.device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self.ctx.device))

    def rewind(self) -> None:
        torch.set_rng_state(self._random[0])
        if len(self._random) > 1:
            torch.cuda.set_rng_state(self._random[1], self.ctx.device)

    def next(self) -> dict[str, Any]:
        PHASE.at(DATA)
        try:
            return self._next()
        finally:
            PHASE.at("forward")

    def _next(self) -> dict[str, Any]:
        if not self.dry:
            self.waits.begin()
            try:
                batch = next(self._batches)
                self.waits.end()
                self.own.arrived()
                return batch
            except GaveUp:
                self.dry = True
            except Exception as error:  # whatever it is, the others must learn of it
                self.dry, self.problem = True, error
        self.own.arrived()
        return self._stand_in()

    def computed(self) -> None:
        """The losses of the last batch are there, as far as this rank's own work goes."""
        self.own.computed()

    def _poll(self) -> bool:
        """Asked ten times a second while no batch is there: whether to wait no longer."""
        self.waits.poll()
        return self._stop()

    def waited(self) -> float:
        """Seconds since this was last asked."""
        return self.loader.waited()

    def _stand_in(self) -> dict[str, Any]:
        """All zeros, in the shape of a batch."""
        a = self.loader
        b = a.global_batch // (a.accumulation * a.world)
        codes = torch.zeros(b, a.views, a.shards.manifest.tokens, dtype=torch.int64)
        names = ("labels", "true_labels", "ids", "epochs")
        return {"step": a.step, "codes": codes, **{name: torch.zeros(b, dtype=torch.int64) for name in names}}

    def why(self) -> Exception | None:
        """What kept any rank from its batch, on all ranks alike; None where only a signal did."""
        return _problem_of_any(self.ctx, self.problem)
