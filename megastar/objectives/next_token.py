"""L_AR: next-token cross-entropy on the (masked) student's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays (for gradient checks), everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows in fp32: logits (R, V), targets (R,) -> scalar in nats."""
    return F.cross_entropy(at_least_fp32(logits), targets)


def next_token_loss(
    logits: Tensor, targets: Tensor, reduce: CrossEntropy = cross_entropy
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over all sequences and positions, in fp32.

    logits (N, S, V), targets (N, T) int64 with S = T: output t predicts token t. ``reduce`` knows how the vocabulary
    is split, if it is. Returns (scalar in nats, metrics).
    """
    loss = reduce(logits.flatten(0, 1), targets.flatten())
    return loss, {"loss_ar": loss.detach()}
