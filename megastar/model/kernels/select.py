"""Which backend attends: the one asked for, or the best that can. A fast one is compared with sdpa when first used."""

from __future__ import annotations

import difflib
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from megastar.errors import UserError
from megastar.model.kernels import sdpa, table
from megastar.model.masks import MaskSpec

NAMES = ("sdpa", "flex", "flash", "triton")
_plain = MaskSpec()
_wanted = "auto"
_chosen: dict[tuple, ModuleType] = {}  # case -> backend, once checked


def backend(name: str) -> ModuleType:
    """The module of that name, with ``missing() -> reason or None`` and ``supports(...) -> reason or None``.

    ``supports(spec, dtype, head_dim, device, grad)``: None where it can, else why not and what would. Each has
    ``attention(q, k, v, mask)``, with S = L. Importing it imports no package that may be absent.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"use auto, {', '.join(NAMES)}"
        raise UserError(f"unknown attention backend {name!r}: {hint}")
    return importlib.import_module(f"megastar.model.kernels.{name}")


def available(name: str) -> bool:
    return backend(name).missing() is None


def set_backend(
    name: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    masks: tuple[MaskSpec, ...] = (),
) -> None:
    """What this process attends with from now on: auto, sdpa, flex, flash or triton.

    Raises ``UserError`` when one asked for by name is missing; with ``device``, also when it could not train with
    that precision and head dimension, plain causal or with one of ``masks``.
    """
    global _wanted
    if name != "auto":
        one = backend(name)
        if (why := one.missing()) is not None:
            raise UserError(f"attention.backend={name} is not here: {why}; attention.backend=auto takes what is")
        for spec in (_plain, *masks) if device is not None else ():
            _require(name, spec, dtype, head_dim, device, True)
    _wanted = name
    _chosen.clear()


def _require(
    name: str, spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device | None, grad: bool
) -> None:
    assert device is not None
    if (why := backend(name).supports(spec, dtype, head_dim, device, grad)) is not None:
        raise UserError(
            f"attention.backend={name} cannot take {_case(spec, dtype, head_dim, device, grad)}: {why}; "
            "attention.backend=auto takes one that can"
        )


def _case(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str:
    way = "forward and backward" if grad else "forward"
    return (
        f"a mask that is {spec.kind}, {str(dtype).removeprefix('torch.')}, head dimension {head_dim}, {device}, {way}"
    )


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; causal without a mask.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions. ``mask`` needs S = L.
    Returns (B, H, S, d). Decoding with a cache (S != L, or one query) always takes sdpa.
    """
    if q.shape[2] != k.shape[2] or q.shape[2] == 1:
        return sdpa.attention(q, k, v, mask)
    if torch.compiler.is_compiling():
        return _outside(q, k, v, mask)
    return _dispatch(q, k, v, mask)


def _dispatch(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None) -> Tensor:
    if _wanted == "sdpa" or (_wanted == "auto" and q.is_cpu):
        return sdpa.attention(q, k, v, mask)
    spec = mask or _plain
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    case = (q.device, q.dtype, q.shape[-1], q.shape[2], spec.kind, grad)
    if case not in _chosen:
        _chosen[case] = _choose(q, k, v, spec, grad)
    return _chosen[case].attention(q, k, v, mask)


# A graph break: kernels are no business of a compiler, and the first use is to be checked on real numbers.
_outside = torch._disable_dynamo(_dispatch)


def _choose(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, grad: bool) -> ModuleType:
    """The first candidate that can, if it agrees with sdpa on these inputs; else sdpa."""
    about = (spec, q.dtype, q.shape[-1], q.device, grad)
    names: tuple[str, ...] = (_wanted,)
    if _wanted == "auto":
        names = table.order(q.device, spec.is_plain_causal, q.shape[-1], q.shape[2])
    else:
        _require(_wanted, *about)
    for name in names:
        one = backend(name)
        if name == "sdpa":
            break
        if one.missing() is None and one.supports(*about) is None:
            problem = disagreement(one, q, k, v, spec, grad)
            if problem is None:
                return one
            warnings.warn(
                f"attention backend {name} {problem} for {_case(*about)}, {q.shape[2]} positions: sdpa is used instead",
                stacklevel=2,
            )
            break
    return sdpa


def disagreement(
    one: ModuleType, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, grad: bool, sequences: int = 2, heads: int = 2
) -> str | None:
    """None when ``one`` agrees with sdpa on the first sequences and heads, else what is wrong.

    Both are compared with sdpa in fp64. The largest error of the output, and of each gradient, may be three times that
    of sdpa in the inputs' own precision, with a floor for rounding that both share.
    """
    few = spec.rows(sequences)
    # Not seen by activation checkpointing, which counts saved tensors, nor by inference mode.
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), identity:
        inputs = [t.detach()[:sequences, :heads].clone() for t in (q, k, v)]
        g = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).to(q)
        try:
            got = _results(one, inputs, few, g, grad)
        except UserError:
            raise
        except Exception as error:  # a compiler's, a driver's, a library's: anything but this run's end
            return (
                f"failed ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
            )
        exact = _results(sdpa, [t.double() for t in inputs], few, g.double(), grad)
        usual = _results(sdpa, inputs, few, g, grad)
    for name, a, b, c in zip(("output", "dq", "dk", "dv"), got, exact, usual, strict=False):
        error, own = (a.double() - b).abs().max().item(), (c.double() - b).abs().max().item()
        allowed = 3 * own + 4 * torch.finfo(q.dtype).eps * b.abs().max().item()
        if not error <= allowed:  # also when it is not a number
            return f"differs from sdpa ({name} off by {error:.2g}, {allowed:.2g} is allowed)"
    return None


def _results(one: ModuleType, inputs: list[Tensor], spec: MaskSpec, g: Tensor, grad: bool) -> list[Tensor]:
    """The output, then with ``grad`` the gradients of q, k and v."""
    inputs = [t.detach().requires_grad_(grad) for t in inputs]
    out = one.attention(*inputs, spec)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)] if grad else [out]
