"""The basic layers of every block. Weights are initialized inside each layer's constructor.

DeepSpeed's ``zero.Init`` shards a layer's weights when its constructor returns, so they cannot be initialized later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megastar.model.fused import rms_norm
from megastar.parallel.cross_entropy import linear_cross_entropy
from megastar.utils.onednn import dropout, linear


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, its weight initialized from N(0, std^2); std 0 gives zeros."""

    def __init__(self, in_features: int, out_features: int, std: float):
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        draw_normal_(self.weight, self.std)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Head(Linear):
    """The output layer: x (..., D) -> logits (..., V), or with targets (...) their mean cross-entropy without the logits.

    The loss is computed here because the weight may be sharded and is gathered only while this layer runs.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, -2), self.weight, targets.flatten())


class Embedding(nn.Embedding):
    """``nn.Embedding``, its table initialized from N(0, std^2)."""

    def __init__(self, rows: int, dim: int, std: float):
        self.std = std
        super().__init__(rows, dim)

    def reset_parameters(self) -> None:
        draw_normal_(self.weight, self.std)


def draw_normal_(weight: Tensor, std: float) -> None:
    """In place, from N(0, std^2); std 0 gives zeros and uses no random numbers."""
    if std:
        nn.init.normal_(weight, std=std)
    else:
        nn.init.zeros_(weight)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, then a learned scale, as LlamaGen's: (..., D) -> (..., D).

    On a GPU by a fused kernel (fused.py), which rounds to bf16 once, after the scale; on a CPU that is no faster.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return rms_norm(x, self.weight, self.eps)
        h = x if x.dtype == torch.float64 else x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight


class Dropout(nn.Dropout):
    """``nn.Dropout`` with the CPU fast path of utils/onednn.py."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        return dropout(x, self.p)
