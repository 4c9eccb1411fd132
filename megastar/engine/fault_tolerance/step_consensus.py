"""What may end a run early, or keep a step from being taken: every rank knows, and takes the same decision."""

from __future__ import annotations

import signal
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.context import Context

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)  # rising


def stop_asked(ctx: Context, signal_number: int) -> int:
    """The largest stop signal of any rank, 0 for none. One reduction, called by all ranks alike where no step's own
    (``StepConsensus``) is at hand."""
    said = torch.tensor([signal_number], dtype=torch.int64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return int(said)


class ConsensusResult(NamedTuple):
    """What all ranks know at the end of a micro-batch."""

    finite: bool  # the loss, everywhere
    signal: int  # the largest stop signal of any rank
    lost: bool  # the save under way failed somewhere
    dry: bool  # some rank had no batch
    loss: float  # its mean over the ranks; those that are not finite count as 0


ONE = 1 << 32  # a loss travels as a multiple of 1 / ONE: integers add up to the same sum in whatever order
MOST = float(1 << 17)  # a larger loss counts as this: the sum of 8,192 ranks stays within 64 bits


class StepConsensus:
    """Asked of all ranks after the forward pass, answered before the optimizer moves; the backward pass fits between.

    One reduction, a sum. On a GPU the numbers travel behind the forward pass while the host queues the backward pass:
    ``answer`` then waits for no more than the forward pass, and the queue does not run dry.
    """

    def __init__(self, ctx: Context, loss: Tensor, stop: int, lost: bool = False, dry: bool = False):
        self.world = ctx.world
        said = torch.tensor([0, 0, int(lost), int(dry), *(int(stop == s) for s in SIGNALS)], dtype=torch.int64)
        numbers = said.pin_memory().to(loss.device, non_blocking=True) if loss.is_cuda else said
        value = loss.detach().double()
        finite = torch.isfinite(value)
        numbers[0] = ~finite
        numbers[1] = torch.where(finite, value.clamp(-MOST, MOST) * ONE, 0.0)
        if ctx.world > 1:
            dist.all_reduce(numbers)
        self.numbers, self.ready = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty(len(said), dtype=torch.int64, pin_memory=True).copy_(numbers, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()

    def answer(self) -> ConsensusResult:
        """The same on every rank."""
        if self.ready is not None:
            self.ready.synchronize()
        nonfinite, loss, lost, dry, *stops = self.numbers.tolist()
        number = max((int(s) for s, count in zip(SIGNALS, stops, strict=True) if count), default=0)
        return ConsensusResult(not nonfinite, number, bool(lost), bool(dry), loss / (ONE * self.world))
