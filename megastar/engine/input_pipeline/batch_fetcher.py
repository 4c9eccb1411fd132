"""The micro-batches of the loop; a rank without one still takes part in the collectives of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from megastar.engine.rank_sync import error_of_any_rank


@dataclass
class OutOfData(Exception):
    """Some rank has no batch for this step, as all ranks know: the run ends after the step before."""

    signal: int  # the stop signal, if one ended the wait


class BatchFetcher:
    """This rank's micro-batches.

    A rank whose wait for data is ended by a stop signal, or whose reading failed, must not leave: the others are in the
    step's collectives already. It continues with a substitute of zeros and sets ``out_of_data``, which all ranks learn
    of in the reduction of each micro-batch. Such a step changes no weight; ``restore_rng`` resets the generator of dropout.

    A long wait is reported in the events of ``run``.
    """

    def __init__(self, loader: TokenLoader, ctx: Context, stop: Callable[[], bool], run: Path):
        self.loader, self.ctx = loader, ctx
        self.timer = ComputeTimer(ctx.device)
        self.out_of_data = False
        self._error: Exception | None = None
        self._stop, self._waits = stop, WaitReporter(loader, ctx, run)
        self._rng: list[Tensor] = []
        self.restart()

    def restart(self) -> None:
        """Continue at the loader's position."""
        self._batches = self.loader.batches(give_up=self._poll)

    def micro_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """Those of one step."""
        self._rng = [torch.get_rng_state()]  # a few microseconds
        if self.ctx.device.type == "cuda":
            self._rng.append(torch.cuda.get_rng_state(self.ctx.device))
        for _ in range(count):
            PHASE.at(DATA)
            batch = self._next()
            PHASE.at("forward")
            yield batch

    def error_of_any_rank(self) -> Exception | None:
        """What kept a rank from its batch, on all ranks alike; None where only a signal did."""
        return error_of_any_rank(self.ctx, self._error)

    def restore_rng(self) -> None:
        """Reset torch's generators to the start of the step."""
        torch.set_rng_state(self._rng[0])
        if len(self._rng) > 1:
            torch.cuda.set_rng_state(self._rng[1], self.ctx.device)

    def _next(self) -> dict[str, Any]:
        try:
            if not self.out_of_data:
                self._waits.begin()
                batch = next(self._batches)
                self._waits.end()
                return batch
        except GaveUp:
            self.out_of_data = True
        except Exception as error:  # of any kind: all ranks must know
            self.out_of_data, self._error = True, error
        finally:
            self.timer.arrived()
        return self._substitute()

    def _poll(self) -> bool:
        """Called ten times a second while no batch is ready: whether to stop waiting."""
        self._waits.poll()
        return self._stop()

    def _substitute(self) -> dict[str, Any]:
        """All zeros, in the shape of a batch."""
        loader = self.loader
        b = loader.global_batch // (loader.accumulation * loader.world)
        codes = torch.zeros(b, loader.views, loader.shards.manifest.tokens, dtype=torch.int64)
        names = ("labels", "true_labels", "ids", "epochs")
        batch = {"step": loader.step, "codes": codes, **{name: torch.zeros(b, dtype=torch.int64) for name in names}}
        if loader.feature_shape:
            batch["features"] = torch.zeros(b, loader.views, *loader.feature_shape, dtype=torch.float16)
        return batch
