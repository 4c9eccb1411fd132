"""What may end a run early: signals, a loss that is no longer finite. Every rank takes the same decision."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.build import Context
from megastar.engine.errors import NONFINITE_GRADIENT, NonFiniteLoss

PREEMPTED = 85  # a status of our own: SLURM counts a clean exit as done and would not requeue it


def stop_asked(ctx: Context, signal_number: int) -> int:
    """The largest stop signal of any rank, 0 for none. One reduction, called by all ranks alike where no step's own
    (``Question``) is at hand."""
    said = torch.tensor([signal_number], dtype=torch.int64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return int(said)


def check_moved(skipped_before: int, skipped_now: int, step: int) -> None:
    """DeepSpeed drops a step whose gradient norm is not finite, on all ranks alike, and says nothing."""
    if skipped_now > skipped_before:
        raise NonFiniteLoss(NONFINITE_GRADIENT.format(step))


class Word(NamedTuple):
    """What all ranks know at the end of a forward pass."""

    finite: bool  # the loss, everywhere
    signal: int  # the largest stop signal of any rank
    lost: bool  # the save under way failed somewhere
    dry: bool  # some rank had no batch
    waited: float  # seconds that the slowest rank waited for its batch


class Question:
    """Asked of all ranks after the forward pass, answered before the optimizer moves; the backward pass fits between.

    One reduction. On a GPU the flags travel behind the forward pass while the host queues the backward pass: ``answer``
    then waits for no more than the forward pass, and the queue does not run dry.
    """

    def __init__(
        self, ctx: Context, loss: Tensor, stop: int, lost: bool = False, dry: bool = False, waited: float = 0.0
    ):
        said = torch.tensor([0, stop, int(lost), int(dry), round(waited * 1e6)], dtype=torch.int64)
        flags = said.pin_memory().to(loss.device, non_blocking=True) if loss.is_cuda else said.to(loss.device)
        flags[0] = ~torch.isfinite(loss.detach())
        if ctx.world > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.flags, self.ready = flags, None
        if flags.is_cuda:
            self.flags = torch.empty(len(said), dtype=torch.int64, pin_memory=True).copy_(flags, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()

    def answer(self) -> Word:
        """The same on every rank."""
        if self.ready is not None:
            self.ready.synchronize()
        nonfinite, signal_number, failed, empty, microseconds = self.flags.tolist()
        return Word(not nonfinite, int(signal_number), bool(failed), bool(empty), microseconds / 1e6)
