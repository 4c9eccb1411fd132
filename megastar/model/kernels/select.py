"""Selects the attention backend: the requested one, or the fastest that supports the case and agrees with sdpa.

Selection and the mask's form for the kernel are outside of the transformer's blocks (``plan``): inside, ``attention`` is one
call of one backend on tensors, so a compiled block has no graph break and a new mask causes no new compilation.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megastar.errors import UserError, nearest
from megastar.model.agreement import disagreement
from megastar.model.kernels import sdpa, table
from megastar.model.masks import MaskSpec

logger = logging.getLogger(__name__)

NAMES = ("sdpa", "flex", "flash", "triton")
_plain = MaskSpec()
_wanted = "sdpa"  # until an engine is built: commands that only infer compile and check nothing
_chosen: dict[tuple[Any, ...], str] = {}  # case -> backend, once checked


class Like(NamedTuple):
    """What a backend needs to know of q, (B, H, S, d): a tensor has these attributes too."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


class AttentionPlan(NamedTuple):
    """A backend's function and its form of one mask: all blocks of a forward pass share it."""

    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    form: Any


def backend(name: str) -> ModuleType:
    """The module of that name, with ``missing()``, ``supports(...)``, ``form(spec, like)`` and ``attend(q, k, v, form)``.

    ``missing() -> reason or None``; ``supports(spec, dtype, head_dim, device, grad)`` -> None if it does, else why not
    and what to use. ``attention(q, k, v, mask)`` is both for S = L. Importing the module imports no optional package.
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


def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionPlan | MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; causal without a mask.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions. ``mask`` requires S = L.
    Returns (B, H, S, d). Decoding with a cache (S != L, or one query) always uses sdpa.
    """
    if isinstance(mask, AttentionPlan):
        return mask.attend(q, k, v, mask.form)
    if q.shape[2] != k.shape[2] or q.shape[2] == 1:
        return sdpa.attention(q, k, v, mask)
    return _planned(q, k, v, mask)


@torch._disable_dynamo
def _planned(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None) -> Tensor:
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    attend, form = plan(mask, q, lambda: (q, k, v), grad)
    return attend(q, k, v, form)


def plan(
    mask: MaskSpec | None, like: Like | Tensor, inputs: Callable[[], Sequence[Tensor]], grad: bool
) -> AttentionPlan:
    """The backend for a mask and q like ``like``. A case's first plan compares it with sdpa on ``inputs()``: q, k, v."""
    spec, size = mask or _plain, like.shape[2]
    case = (_wanted, like.device, like.dtype, like.shape[3], size, spec.kind, grad)
    if case not in _chosen:
        _chosen[case] = _choose(spec, like, inputs, grad) if size > 1 else "sdpa"
    module = backend(_chosen[case])
    return AttentionPlan(module.attend, module.form(spec, like))


def chosen() -> dict[str, str]:
    """The backend of each kind of mask so far, and of sdpa on a GPU the kernel: for the record of a run."""
    return {
        f"{kind}, {'forward and backward' if grad else 'forward'}": sdpa.kernel(dtype, d, size, kind, device)
        if name == "sdpa"
        else name
        for (wanted, device, dtype, d, size, kind, grad), name in _chosen.items()
        if wanted == _wanted
    }


@contextlib.contextmanager
def only_sdpa() -> Iterator[None]:
    global _wanted
    before, _wanted = _wanted, "sdpa"
    try:
        yield
    finally:
        _wanted = before


def _choose(spec: MaskSpec, like: Like | Tensor, inputs: Callable[[], Sequence[Tensor]], grad: bool) -> str:
    """The first candidate that supports the case and agrees with sdpa on these inputs; else sdpa."""
    case = (spec, like.dtype, like.shape[3], like.device, grad)
    names: tuple[str, ...] = (_wanted,)
    if _wanted == "auto":
        names = table.order(like.device, spec.is_plain_causal, like.shape[3], like.shape[2])
    else:
        _require(_wanted, *case)
    for name in dict.fromkeys(names):
        module = backend(name)
        if name == "sdpa":
            break
        if module.missing() is None and module.supports(*case) is None:
            problem = _check(module, inputs(), spec, grad)
            if problem is None:
                return name
            message = "attention backend %s %s for %s, %d positions; using the next one"
            logger.warning(message, name, problem, _describe(*case), like.shape[2])
    return "sdpa"


def _check(module: ModuleType, inputs: Sequence[Tensor], spec: MaskSpec, grad: bool) -> str | None:
    """``disagreement`` with sdpa. The backend runs on all of q, k, v, as it will later, which compiles what it will use;
    the first two sequences and heads are compared."""
    few = spec.rows(2)

    def all_of_it(g: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(grad) for t in inputs]
        out = module.attend(*leaves, module.form(spec, leaves[0]))
        part = out[:2, :2]
        return [part.detach(), *(t[:2, :2] for t in (torch.autograd.grad(part, leaves, g) if grad else ()))]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa.attention(q, k, v, few)

    parts = [t[:2, :2] for t in inputs]
    return disagreement(all_of_it, reference, parts, ("output", "dq", "dk", "dv"), "sdpa", grad, whole=True)
