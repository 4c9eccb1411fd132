"""Agreement of all ranks on what ends a run early or skips a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.context import Context
from megastar.utils.signals import RANK_SIGNALS

SIGNALS = sorted(RANK_SIGNALS)


def any_stop_signal(ctx: Context, signal_number: int) -> int:
    """The largest stop signal of any rank, 0 for none. A collective for where there is no step with its own
    (``StepConsensus``)."""
    number = torch.tensor([signal_number], dtype=torch.int64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


class ConsensusResult(NamedTuple):
    """What all ranks know at the end of a micro-batch."""

    finite: bool  # the loss, everywhere
    signal: int  # the largest stop signal of any rank
    save_failed: bool  # the save under way, on some rank
    out_of_data: bool  # some rank had no batch
    loss: float  # its mean over the ranks; those that are not finite count as 0


ONE = 1 << 32  # a loss is sent as a multiple of 1 / ONE: the sum of integers does not depend on their order
MOST = float(1 << 17)  # a larger loss counts as this: the sum of 8,192 ranks stays within 64 bits


class StepConsensus:
    """One sum over all ranks, started after the forward pass; the result is needed before the optimizer step.

    On a GPU the reduction follows the forward pass on the device while the host queues the backward pass: ``result``
    waits for the forward pass only, and the device's queue never empties.
    """

    def __init__(self, ctx: Context, loss: Tensor, stop: int, save_failed: bool = False, out_of_data: bool = False):
        self.world = ctx.world
        stops = [int(stop == s) for s in SIGNALS]
        mine = torch.tensor([0, 0, int(save_failed), int(out_of_data), *stops], dtype=torch.int64)
        numbers = mine.pin_memory().to(loss.device, non_blocking=True) if loss.is_cuda else mine
        value = loss.detach().double()
        finite = torch.isfinite(value)
        numbers[0] = ~finite
        numbers[1] = torch.where(finite, value.clamp(-MOST, MOST) * ONE, 0.0)
        if ctx.world > 1:
            dist.all_reduce(numbers)
        self.numbers, self.ready = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty(len(mine), dtype=torch.int64, pin_memory=True).copy_(numbers, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()

    def result(self) -> ConsensusResult:
        """The same on every rank."""
        if self.ready is not None:
            self.ready.synchronize()
        nonfinite, loss, save_failed, out_of_data, *stops = self.numbers.tolist()
        number = max((int(s) for s, count in zip(SIGNALS, stops, strict=True) if count), default=0)
        return ConsensusResult(not nonfinite, number, bool(save_failed), bool(out_of_data), loss / (ONE * self.world))
