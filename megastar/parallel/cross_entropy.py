"""The output layer fused with its cross-entropy, in chunks of rows, so only one chunk of logits is in memory at a time.

R rows, D width, V vocabulary. If the vocabulary is split over a tensor group, each rank has its share of the weight and
sends three numbers per row, as Megatron-LM (arXiv 1909.08053). The gradients are computed with the loss in the forward
pass, as in Liger's fused loss (arXiv 2410.10989): three matrix products in total, none computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.parallel.plan import chunk_rows
from megastar.utils.onednn import product, uses_onednn


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits ``hidden weight^T``, at least in fp32.

    hidden (R, D); weight (V, D), or this rank's (V / ranks, D) in rank order when ``group`` is given; targets (R,) int64
    over the whole vocabulary. With a group the loss and the gradient of ``hidden`` are equal on all its ranks.
    """
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, group, needed)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None, needed: bool
    ) -> Tensor:
        rows, size = len(hidden), chunk_rows(len(hidden), len(weight), hidden.device.type)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        to_hidden = torch.empty_like(hidden) if needed and ctx.needs_input_grad[0] else None
        to_weight: Tensor | None = None
        loss = hidden.new_zeros((), dtype=wide)
        for x, targets_of, at in zip(hidden.split(size), targets.split(size), range(0, rows, size), strict=True):
            gradient, losses = _softmax_less_target(product(x, weight), targets_of, group, wide)
            loss += losses.sum()
            gradient = gradient.to(hidden.dtype)  # rows times that of the mean: scaled in the backward pass
            if to_hidden is not None:
                to_hidden[at : at + size] = product(gradient, weight.t())
            if needed and ctx.needs_input_grad[1]:
                to_weight = _add_product(to_weight, gradient, x, wide)
            del gradient  # before the next chunk's logits
        ctx.gradients = (to_hidden, to_weight)
        ctx.rows, ctx.group, ctx.dtype = rows, group, weight.dtype
        return loss / rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_cross_entropy was taken before, and can be taken only once")
        to_hidden, to_weight = ctx.gradients
        ctx.gradients = None  # scaled in place, and given away: autograd would copy a tensor that is referred to here
        scale = gradients[0] / ctx.rows
        if to_hidden is not None:
            to_hidden = to_hidden.mul_(scale)
            if ctx.group is not None:
                dist.all_reduce(to_hidden, group=ctx.group)
        return to_hidden, None if to_weight is None else to_weight.mul_(scale).to(ctx.dtype), None, None, None


def _add_product(total: Tensor | None, gradient: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """``total`` (V, D) plus gradient^T x. Sums over chunks are wide: in bf16 each chunk would be rounded."""
    if total is None:
        return product(gradient.t(), x.t())
    total = total.to(wide)
    if gradient.dtype == wide and not uses_onednn(gradient.t(), x.t()):
        return total.addmm_(gradient.t(), x)
    return total.add_(product(gradient.t(), x.t()))


def _softmax_less_target(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the gradient of each row's loss in its logits, the losses (R,)); logits (R, V), or a rank's share of them."""
    targets = targets[:, None]
    if group is None:
        logs = torch.log_softmax(logits, -1, dtype=wide)
        losses = -logs.gather(1, targets).squeeze(1)
        return logs.exp_().scatter_add_(1, targets, logs.new_full(targets.shape, -1.0)), losses
    shifted, width = logits.to(wide), logits.shape[-1]
    largest = shifted.amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = shifted.sub_(largest)
    local = targets - dist.get_rank(group) * width
    is_local = ((local >= 0) & (local < width)).to(wide)  # (R, 1): whether the target is in this rank's share
    local = local.clamp(0, width - 1)
    target_logits = shifted.gather(1, local) * is_local
    exponentials = shifted.exp_()
    sums = torch.stack([exponentials.sum(-1, keepdim=True), target_logits])  # (2, R, 1)
    dist.all_reduce(sums, group=group)
    return exponentials.div_(sums[0]).scatter_add_(1, local, -is_local), (sums[0].log() - sums[1]).squeeze(1)
