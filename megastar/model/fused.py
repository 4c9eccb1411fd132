"""SwiGLU and RMSNorm from optional libraries on a GPU (Liger, NVIDIA apex) and RoPE by our Triton kernel, each compared with
torch's operations at its first use.

Not yet run on a GPU. F columns; under ``torch.compile`` the compiler fuses torch's own operations instead.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.agreement import disagreement

Parts = tuple[Tensor, Tensor, Tensor]
logger = logging.getLogger(__name__)

# operation -> (package, module, function). The function's name is checked: other packages are named apex too.
SOURCES = {
    "swiglu": ("liger-kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
    "rms_norm": ("apex", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine"),
    "rope": ("triton", "megastar.model.kernels.triton_rope", "SplitQKV"),
}
ROWS = 64  # compared at the first use
RESULTS = ("result", "gradient 1", "gradient 2")
_enabled = True
_chosen: dict[tuple[Any, ...], bool] = {}  # case -> whether the library's operation is used, once compared


def set_fused(on: bool) -> None:
    """Whether this process uses the libraries' operations where they are installed."""
    global _enabled
    _enabled = on
    _chosen.clear()


@functools.cache
def library_function(operation: str) -> Any:
    """The library's function for an operation, or None. Imported when a GPU is used first."""
    _, module, name = SOURCES[operation]
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception:  # missing, another package of that name, built for another torch: it is not usable
        return None
    return function if callable(function) else None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b, element by element, (..., F) each. Liger's backward pass overwrites a and b."""
    if _uses_torch(a) or not _usable("swiglu", _plain_swiglu, _liger_swiglu, (a, b)):
        return _plain_swiglu(a, b)
    return _liger_swiglu(a, b)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, rounded once: x (..., F), weight (F,)."""
    plain, fused = functools.partial(_plain_rms_norm, eps=eps), functools.partial(_apex_rms_norm, eps=eps)
    return (plain if _uses_torch(x) or not _usable("rms_norm", plain, fused, (x, weight), eps) else fused)(x, weight)


def split_qkv(plain: Callable[[Tensor, Tensor], Parts], qkv: Tensor, table: Tensor) -> Parts:
    """``plain(qkv, table)`` or the same by our kernel: qkv (B, S, 3, H, d) -> q and k, rotated, and v: (B, H, S, d) each."""
    if _uses_torch(qkv) or qkv.dtype == torch.float64:
        return plain(qkv, table)

    def whole(split: Callable[[Tensor, Tensor], Parts], x: Tensor) -> Tensor:
        parts = split(x, table.double() if x.dtype == torch.float64 else table)
        return torch.stack(parts).permute(1, 3, 0, 2, 4)  # as x

    whole_plain, whole_fused = functools.partial(whole, plain), functools.partial(whole, _triton_split_qkv)
    use = _usable("rope", whole_plain, whole_fused, (qkv,), *qkv.shape[1:4])
    return _triton_split_qkv(qkv, table) if use else plain(qkv, table)


def _plain_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def _liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return library_function("swiglu").apply(a, b)


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return library_function("rms_norm")(x, weight, tuple(weight.shape), eps)


def _triton_split_qkv(qkv: Tensor, table: Tensor) -> Parts:
    parts: Parts = library_function("rope").apply(qkv, table)
    return parts


def _uses_torch(x: Tensor) -> bool:
    return not _enabled or not x.is_cuda or torch.compiler.is_compiling()


def _usable(
    operation: str, plain: Callable[..., Tensor], fused: Callable[..., Tensor], inputs: tuple[Tensor, ...], *key: float
) -> bool:
    """Whether ``fused`` is installed and agreed with ``plain`` on the first inputs of this case."""
    x, grad = inputs[0], torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    case = (operation, x.device, x.dtype, x.shape[-1], grad, *key)
    if case not in _chosen:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be compared while a graph is captured
        problem: str | None = "is not installed"
        if library_function(operation):
            part = [t if t.ndim == 1 else t[:1] if t.ndim == 5 else t.flatten(0, -2)[:ROWS] for t in inputs]
            problem = disagreement(fused, plain, part, RESULTS, "torch", grad)
            if problem:
                logger.warning(
                    "%s: %s %s for %d columns, %s, %s; using torch instead",
                    *(SOURCES[operation][0], operation, problem, x.shape[-1]),
                    *(str(x.dtype).removeprefix("torch."), x.device),
                )
        _chosen[case] = problem is None
    return _chosen[case]
