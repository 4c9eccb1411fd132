"""LARS as in MAE's linear probe, for many small layers of one shape at once. Source: MAE util/lars.py, lr_sched.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LARS:
    """SGD with momentum whose step on a layer's weight has the length trust * |weight| for any gradient.

    Each tensor stacks layers in its first dimension. Weight decay and trust ratio apply to the weights (layers, in, out),
    not to ``biases``, as in MAE for one-dimensional tensors. ``adaptive`` False is plain SGD with momentum.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adaptive: bool = True,
    ):
        self.weights, self.biases = weights, biases
        self.momentum, self.weight_decay, self.trust, self.adaptive = momentum, weight_decay, trust, adaptive
        self.velocity = [torch.zeros_like(p) for p in (*weights, *biases)]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float) -> None:
        """``gradients`` of the weights, then of the biases."""
        for i, (p, g, v) in enumerate(zip((*self.weights, *self.biases), gradients, self.velocity, strict=True)):
            if i < len(self.weights):
                g = g + self.weight_decay * p
                if self.adaptive:
                    size, slope = (x.flatten(1).norm(dim=1) for x in (p, g))  # (layers,)
                    ratio = torch.where((size > 0) & (slope > 0), self.trust * size / slope.clamp_min(1e-38), 1.0)
                    g = g * ratio.view(-1, *[1] * (p.ndim - 1))
            v.mul_(self.momentum).add_(g)
            p.sub_(v, alpha=lr)


def learning_rate(epoch: float, epochs: int, peak: float, warmup: float = 10) -> float:
    """MAE's schedule at a fractional ``epoch``: linear from 0 over ``warmup`` epochs, then a half cosine to 0.

    A run shorter than ``warmup`` uses a ninth of its epochs, as 10 of 90.
    """
    warmup = warmup if epochs > warmup else epochs / 9
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
