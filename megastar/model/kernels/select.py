"""Selects the attention backend: the requested one, or the fastest that supports the case. Its first use is checked."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megastar.errors import UserError, nearest
from megastar.model.agreement import disagreement
from megastar.model.kernels import sdpa, table
from megastar.model.masks import MaskSpec

logger = logging.getLogger(__name__)

NAMES = ("sdpa", "flex", "flash", "triton")
_plain = MaskSpec()
_wanted = "auto"
_chosen: dict[tuple[Any, ...], ModuleType] = {}  # case -> backend, once checked


def backend(name: str) -> ModuleType:
    """The module of that name, with ``missing()``, ``supports(...)`` and ``attention(q, k, v, mask)`` for S = L.

    ``missing() -> reason or None``; ``supports(spec, dtype, head_dim, device, grad)`` -> None if it does, else why not
    and what to use. Importing the module imports no optional package.
    """
    if name not in NAMES:
        raise UserError(f"unknown attention backend {name!r}: {nearest(name, ('auto', *NAMES))}")
    return importlib.import_module(f"megastar.model.kernels.{name}")


def set_backend(
    name: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    masks: tuple[MaskSpec, ...] = (),
) -> None:
    """Set the attention backend of this process: auto, sdpa, flex, flash or triton.

    Raises ``UserError`` if a backend requested by name is missing; with ``device``, also if it cannot train with that
    precision and head dimension, plain causal or with one of ``masks``.
    """
    global _wanted
    if name != "auto":
        if (why := backend(name).missing()) is not None:
            raise UserError(f"attention.backend={name} is not available: {why}; or set attention.backend=auto")
        if device is not None:
            for spec in (_plain, *masks):
                _require(name, spec, dtype, head_dim, device, True)
    _wanted = name
    _chosen.clear()


def _require(name: str, spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> None:
    if (why := backend(name).supports(spec, dtype, head_dim, device, grad)) is not None:
        case = _describe(spec, dtype, head_dim, device, grad)
        raise UserError(f"attention.backend={name} does not support {case}: {why}; or set attention.backend=auto")


def _describe(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str:
    passes = "forward and backward" if grad else "forward"
    precision = str(dtype).removeprefix("torch.")
    return f"a mask that is {spec.kind}, {precision}, head dimension {head_dim}, {device}, {passes}"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; causal without a mask.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions. ``mask`` requires S = L.
    Returns (B, H, S, d). Decoding with a cache (S != L, or one query) always uses sdpa.
    """
    if q.shape[2] != k.shape[2] or q.shape[2] == 1:
        return sdpa.attention(q, k, v, mask)
    if torch.compiler.is_compiling():
        return _dispatch_uncompiled(q, k, v, mask)
    return _dispatch(q, k, v, mask)


def _dispatch(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None) -> Tensor:
    if _wanted == "sdpa" or (_wanted == "auto" and q.is_cpu):
        return sdpa.attention(q, k, v, mask)
    spec = mask or _plain
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    case = (q.device, q.dtype, q.shape[-1], q.shape[2], spec.kind, grad)
    if case not in _chosen:
        _chosen[case] = _choose(q, k, v, spec, grad)
    return _chosen[case].attention(q, k, v, spec)


# A graph break: the compiler cannot improve these kernels, and the first use is checked on real numbers.
_dispatch_uncompiled = torch._disable_dynamo(_dispatch)


def _choose(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, grad: bool) -> ModuleType:
    """The first candidate that supports the case, if it agrees with sdpa on these inputs; else sdpa."""
    case = (spec, q.dtype, q.shape[-1], q.device, grad)
    names: tuple[str, ...] = (_wanted,)
    if _wanted == "auto":
        names = table.order(q.device, spec.is_plain_causal, q.shape[-1], q.shape[2])
    else:
        _require(_wanted, *case)
    for name in names:
        module = backend(name)
        if name == "sdpa":
            break
        if module.missing() is None and module.supports(*case) is None:
            problem = _check_first_use(module, q, k, v, spec, grad)
            if problem is None:
                return module
            message = "attention backend %s %s for %s, %d positions; using sdpa instead"
            logger.warning(message, name, problem, _describe(*case), q.shape[2])
            break
    return sdpa


def _check_first_use(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, grad: bool) -> str | None:
    """``disagreement`` with sdpa on the first two sequences and heads."""
    few = spec.rows(2)

    def attend(of: ModuleType) -> Callable[..., Tensor]:
        return lambda q, k, v: of.attention(q, k, v, few)

    inputs = [t[:2, :2] for t in (q, k, v)]
    return disagreement(attend(module), attend(sdpa), inputs, ("output", "dq", "dk", "dv"), "sdpa", grad)
