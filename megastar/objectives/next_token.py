"""L_AR: next-token cross-entropy on the (masked) student's output.

This is the definition. Training computes the same from the features, without all logits (parallel/cross_entropy.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 is kept (for gradient checks), everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over all sequences and positions, in fp32.

    logits (N, S, V), targets (N, T) int64 with S = T: output t predicts token t. Returns (scalar in nats, metrics).
    """
    loss = F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets.flatten())
    return loss, {"loss_ar": loss.detach()}
