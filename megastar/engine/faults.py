"""What may end a run early: signals, a loss that is no longer finite. Every rank takes the same decision."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.build import Context
from megastar.engine.errors import NONFINITE_GRADIENT, NonFiniteLoss

PREEMPTED = 85  # a status of our own: SLURM counts a clean exit as done and would not requeue it


class StopFlag:
    """Set by TERM, USR1 or the first INT; the loop saves and leaves at the next step. A second INT ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


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


def agree(ctx: Context, loss: Tensor, stop: int, lost: bool = False, dry: bool = False, waited: float = 0.0) -> Word:
    """Before the optimizer moves, on every rank alike, in one reduction."""
    bad = (~torch.isfinite(loss.detach())).to(torch.int64)
    own = torch.tensor([stop, int(lost), int(dry), round(waited * 1e6)], dtype=torch.int64).to(loss.device)
    flags = torch.cat([bad.view(1), own])
    if ctx.world > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    nonfinite, signal_number, failed, empty, microseconds = flags.tolist()
    return Word(not nonfinite, int(signal_number), bool(failed), bool(empty), microseconds / 1e6)
