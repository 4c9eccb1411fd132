"""Batch normalization over the global batch, on any device (``torch.nn.SyncBatchNorm`` supports GPUs only)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megastar.parallel.replicas import Replicas


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose statistics in training are those of all ranks' images. Same state, same result as one process."""

    replicas = Replicas()

    def forward(self, x: Tensor) -> Tensor:
        if self.replicas.world == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.replicas.mean(h.mean((0, 2, 3)))  # (C,)
        centred = h - mean[:, None, None]
        variance = self.replicas.mean(centred.square().mean((0, 2, 3)))  # (C,)
        self._update(mean.detach(), variance.detach(), x.numel() // x.shape[1] * self.replicas.world)
        h = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            h = h * self.weight[:, None, None] + self.bias[:, None, None]
        return h.to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), share)


def use_global_batch(module: nn.Module, replicas: Replicas) -> nn.Module:
    """Make each layer of ``module`` that has batch statistics use those of the global batch; returns ``module``.

    These are each ``BatchNorm2d``, and each layer with an attribute ``replicas``, which is set: such a layer averages its
    statistics with ``replicas.mean``.
    """
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = GlobalBatchNorm2d
        if hasattr(layer, "replicas"):
            vars(layer)["replicas"] = replicas
    return module
