"""Attention by torch's flex_attention, compiled once per shape. Forward and backward on a GPU, forward only on CPU.

In a compiled block it is part of the block's graph."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

from megastar.model.masks import MaskSpec


@functools.cache
def _compiled(case: tuple[Any, ...]) -> Any:
    """flex_attention for one case, with its own code object: torch stops compiling one after eight recompilations."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Any:
        return flex_attention(q, k, v, block_mask=blocks)

    name = f"attend_{abs(hash(case)):x}"
    own = types.FunctionType(attend.__code__.replace(co_name=name), globals(), name, None, attend.__closure__)
    return torch.compile(own, dynamic=False)


@functools.cache
def missing() -> str | None:
    try:
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError:
        return "this torch has no flex_attention: install torch 2.7 or later"
    return None


def supports(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str | None:
    if device.type == "cpu":
        return "it has no backward pass on CPU: use sdpa there" if grad else None
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not support {dtype}: use bf16, or sdpa"
    return None


def form(spec: MaskSpec, like: Any) -> tuple[Any, tuple[Any, ...]]:
    """The block mask, and what a compilation depends on."""
    return spec.flex(like.shape[2], like.device), (spec.kind, spec.window)


def attend(q: Tensor, k: Tensor, v: Tensor, form: tuple[Any, tuple[Any, ...]]) -> Tensor:
    blocks, kind = form
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        out: Tensor = flex_attention(q, k, v, block_mask=blocks)
        return out
    return _compiled((q.shape, q.dtype, q.device, kind, torch.is_grad_enabled()))(q, k, v, blocks)


def attention(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
    """As ``sdpa.attention``, with S = L."""
    return attend(q, k, v, form(spec, q))
