"""fp32 matrix products on a CPU by oneDNN where torch's own are slow; everything else is torch's.

R rows, K inner dimension, N columns. torch takes MKL for fp32, which uses half the vector width of an AMD processor with
AVX-512; oneDNN, which torch carries for its other types, uses all of it. Both sum in fp32, in other orders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.utils.device import mkl_is_slow

LEAST = 1 << 22  # multiplications below which calling oneDNN costs more than it saves


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: (R, K), (N, K) -> (R, N), any strides."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and a.shape[0] * b.numel() >= LEAST and mkl_is_slow():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.t()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` without a bias, with its gradients: x (..., K), weight (N, K) -> (..., N)."""
    slow = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling() and mkl_is_slow()
    if slow and x.numel() * weight.shape[0] >= LEAST:
        out: Tensor = _Linear.apply(x, weight)
        return out
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)  # (R, N)
        to_x = product(g, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        to_weight = product(g.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight
