"""SwiGLU and RMSNorm from optional libraries on a GPU (Liger, NVIDIA apex), each compared with torch's at its first use.

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

logger = logging.getLogger(__name__)

# operation -> (package, module, function). The function's name is checked: other packages are named apex too.
SOURCES = {
    "swiglu": ("liger-kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
    "rms_norm": ("apex", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine"),
}
ROWS = 64  # compared at the first use
RESULTS = ("result", "gradient 1", "gradient 2")
_enabled = True
_chosen: dict[tuple[Any, ...], Callable[..., Tensor]] = {}  # case -> the operation, once compared


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
    return _plain_swiglu(a, b) if _uses_torch(a) else _dispatch("swiglu", _plain_swiglu, _liger_swiglu, (a, b))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, rounded once: x (..., F), weight (F,)."""
    plain = functools.partial(_plain_rms_norm, eps=eps)
    if _uses_torch(x):
        return plain(x, weight)
    return _dispatch("rms_norm", plain, functools.partial(_apex_rms_norm, eps=eps), (x, weight), eps)


def _plain_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def _liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return library_function("swiglu").apply(a, b)


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return library_function("rms_norm")(x, weight, tuple(weight.shape), eps)


def _uses_torch(x: Tensor) -> bool:
    return not _enabled or not x.is_cuda or torch.compiler.is_compiling()


def _dispatch(
    operation: str, plain: Callable[..., Tensor], fused: Callable[..., Tensor], inputs: tuple[Tensor, ...], *key: float
) -> Tensor:
    """``fused`` of the inputs if the library is installed and its first result was right, else ``plain``."""
    x, grad = inputs[0], torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    case = (operation, x.device, x.dtype, x.shape[-1], grad, *key)
    if case not in _chosen:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return plain(*inputs)  # nothing can be compared while a graph is captured
        problem: str | None = "is not installed"
        if library_function(operation):
            part = [t if t.ndim == 1 else t.flatten(0, -2)[:ROWS] for t in inputs]
            problem = disagreement(fused, plain, part, RESULTS, "torch", grad)
            if problem:
                logger.warning(
                    "%s: %s %s for %d columns, %s, %s; using torch instead",
                    *(SOURCES[operation][0], operation, problem, x.shape[-1]),
                    *(str(x.dtype).removeprefix("torch."), x.device),
                )
        _chosen[case] = plain if problem else fused
    return _chosen[case](*inputs)
