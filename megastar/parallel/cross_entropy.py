"""Cross-entropy of logits whose vocabulary is split over a tensor group: three small reductions, no gathered logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean cross-entropy in nats, in fp32, equal on all ranks of ``group``.

    logits (R, V / ranks), this rank's share of the vocabulary in rank order; targets (R,) int64 over the whole
    vocabulary. Communicates three numbers a row instead of V (Megatron-LM's way of doing it, arXiv 1909.08053).
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets, group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        largest = wide.amax(-1)  # (R,)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = wide - largest[:, None]
        width = logits.shape[-1]
        local = targets - dist.get_rank(group) * width
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        chosen = shifted.gather(1, local[:, None]).squeeze(1) * mine
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), chosen])  # (2, R)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), local, mine)  # the softmax
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, mine = ctx.saved_tensors
        rows = len(softmax)
        out = softmax.scatter_add(1, local[:, None], -mine.to(softmax.dtype)[:, None])
        return (out * (gradients[0] / rows)).to(ctx.dtype), None, None
