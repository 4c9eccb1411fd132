"""CPU-only fast paths behind one switch: fp32 matrix products by oneDNN, and dropout.

R rows, K inner dimension, N columns. torch uses MKL for fp32 products, which uses half the vector width of an AMD
processor with AVX-512; oneDNN, which torch includes for other types, uses all of it. Both sum in fp32, in different
orders. torch's dropout draws one number per element on one thread.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1 << 22  # multiplications below which the overhead of oneDNN exceeds its gain
_enabled = True
_linear = F.linear  # ZeRO stage 3 replaces F.linear by a function that a compiler compiles anew for each weight


def set_enabled(value: bool) -> None:
    """Whether the functions below use the fast paths (default) or torch's own implementations."""
    global _enabled
    _enabled = value


def enabled(x: Tensor) -> bool:
    """Whether fast paths apply to ``x``."""
    return _enabled and x.device.type == "cpu"


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training. On a CPU each element uses 16 random bits.

    There the probability is p to within 1/131072, and the scale is exact for the rounded probability.
    """
    if not enabled(x):
        return F.dropout(x, p, True)
    n, dropped = x.numel(), round(p * 65536)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = (bits[:n] >= dropped - 32768).view(x.shape)
    return x * (keep.to(x.dtype) * (65536 / (65536 - dropped)))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: (R, K), (N, K) -> (R, N), any strides."""
    if a.dtype == torch.float32 and enabled(a) and a.shape[0] * b.numel() >= LEAST and mkl_is_slow():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.t()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` without a bias, with its gradients: x (..., K), weight (N, K) -> (..., N)."""
    if torch.compiler.is_compiling():
        return _linear(x, weight)
    slow = x.dtype == torch.float32 and enabled(x) and mkl_is_slow()
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


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether oneDNN is faster than MKL in fp32 products on this CPU: AMD with AVX-512 (207 against 93 GFLOP/s per core on Zen 5).

    oneDNN is called through a private operator of torch's compiler, so its presence and result are checked.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return False
        a, b = torch.ones(3, 5), torch.arange(10.0).view(2, 5)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), a @ b.t())
    except (OSError, AttributeError, RuntimeError, TypeError):
        return False
