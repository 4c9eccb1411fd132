"""SwiGLU and RMSNorm by optional libraries on a GPU: Liger's and NVIDIA apex's, each compared once with torch's.

Never run on a GPU yet. F columns; under ``torch.compile`` the compiler fuses torch's own.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# operation -> (package, module, what is called there). By the very name: other packages are called apex too.
SOURCES = {
    "swiglu": ("liger-kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
    "rms_norm": ("apex", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine"),
}
ROWS = 64  # compared
_on = True
_chosen: dict[tuple, Callable[..., Tensor]] = {}  # case -> the operation, once compared


def set_fused(on: bool) -> None:
    """Whether this process takes the libraries' operations where they are."""
    global _on
    _on = on
    _chosen.clear()


@functools.cache
def found(operation: str) -> Any:
    """What the library has for it, or None. Looked for when a GPU is used first."""
    _, module, name = SOURCES[operation]
    try:
        one = getattr(importlib.import_module(module), name, None)
    except Exception:  # missing, another package of that name, built for another torch: it is not usable
        return None
    return one if callable(one) else None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b, element by element, (..., F) each. Liger's backward pass overwrites a and b."""
    return _plain_swiglu(a, b) if _left_to_torch(a) else _take("swiglu", _plain_swiglu, _liger_swiglu, (a, b))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, rounded once: x (..., F), weight (F,)."""
    plain = functools.partial(_plain_rms_norm, eps=eps)
    if _left_to_torch(x):
        return plain(x, weight)
    return _take("rms_norm", plain, functools.partial(_apex_rms_norm, eps=eps), (x, weight), eps)


def _plain_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def _liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = found("swiglu").apply(a, b)
    return out


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = found("rms_norm")(x, weight, tuple(weight.shape), eps)
    return out


def _left_to_torch(x: Tensor) -> bool:
    return not _on or not x.is_cuda or torch.compiler.is_compiling()


def _take(
    operation: str,
    plain: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *about: float,
) -> Tensor:
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    case = (operation, inputs[0].device, inputs[0].dtype, inputs[0].shape[-1], grad, *about)
    if case not in _chosen:
        if inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return plain(*inputs)  # a graph under capture is no place to compare
        problem = found(operation) and disagreement(plain, fused, inputs, grad)
        if problem:
            warnings.warn(
                f"{SOURCES[operation][0]}'s {operation} {problem} for {inputs[0].shape[-1]} columns, "
                f"{str(inputs[0].dtype).removeprefix('torch.')}, {inputs[0].device}: torch's is used instead",
                stacklevel=3,
            )
        _chosen[case] = fused if found(operation) and not problem else plain
    return _chosen[case](*inputs)


def disagreement(
    plain: Callable[..., Tensor], fused: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: bool
) -> str | None:
    """None when both agree on the first rows of the inputs, else what is wrong.

    Both are compared with ``plain`` in fp64; the result, and with ``grad`` each gradient, may be off three times as far
    as ``plain`` in the inputs' own precision, with a floor for rounding that both share.
    """
    # Not seen by activation checkpointing, which counts saved tensors, nor by inference mode.
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), identity:
        few = [t.detach().clone() if t.ndim == 1 else t.detach().flatten(0, -2)[:ROWS].clone() for t in inputs]
        g = torch.randn(few[0].shape, generator=torch.Generator().manual_seed(0)).to(few[0])

        def results(work: Callable[..., Tensor], wide: bool) -> list[Tensor]:
            leaves = [(t.double() if wide else t.clone()).requires_grad_(grad) for t in few]
            # Off the leaves, which an operation that writes into its inputs may not touch.
            out = work(*(t * 1 for t in leaves))
            return [out.detach().double()] + ([*torch.autograd.grad(out, leaves, g.to(out.dtype))] if grad else [])

        try:
            got = results(fused, False)
        except Exception as error:  # a compiler's, a driver's, a library's: anything but this run's end
            lines = str(error).strip().splitlines()
            return f"failed ({type(error).__name__}: {lines[0] if lines else ''})"
        exact, usual = results(plain, True), results(plain, False)
    for place, (a, b, c) in enumerate(zip(got, exact, usual, strict=True)):
        error, own = (a.double() - b).abs().max().item(), (c.double() - b).abs().max().item()
        allowed = 3 * own + 4 * torch.finfo(few[0].dtype).eps * b.abs().max().item()
        if not error <= allowed:  # also when it is not a number
            what = f"gradient {place}" if place else "result"
            return f"differs from torch's ({what} off by {error:.2g}, {allowed:.2g} is allowed)"
    return None
