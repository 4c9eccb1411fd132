"""Compares every backend with fp64 attention: one example per pattern, and the errors beside those of sdpa."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megastar.model.kernels.select import NAMES, backend
from megastar.model.masks import PATTERNS, MaskSpec, draw_hidden

RESULTS = ("output", "dq", "dk", "dv")


def exact_attention(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
    """In fp64 from explicit logits, (B, H, S, d) each: the reference of all kernels."""
    q, k, v = q.double(), k.double(), v.double()
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = torch.softmax(logits.masked_fill(~spec.dense(q.shape[2], q.device), float("-inf")), -1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def example(name: str, batch: int, size: int, seed: int = 0) -> MaskSpec:
    """A random mask of each pattern, different for each sequence where the pattern allows it: on CPU."""
    g = torch.Generator().manual_seed(seed)
    width = max(2, round(size**0.5))
    if name == "hidden":
        return MaskSpec.hidden(draw_hidden(seed, torch.zeros(batch), torch.arange(batch), size, 0.25))
    if name == "prefix":
        return MaskSpec.prefix(torch.randint(1, size // 2, (batch,), generator=g), size)
    if name == "documents":
        return MaskSpec.documents((torch.rand(batch, size, generator=g) < 4 / size).cumsum(1))
    options: dict[str, dict[str, int]] = {
        "causal": {},
        "sliding_window": {"size": size, "width": size // 4},
        "neighbourhood": {"width": width, "rows": 2, "columns": 3},
        "row_blocks": {"size": size, "width": width, "rows": 2},
    }
    return PATTERNS[name](**options[name])


def draw(batch: int, heads: int, size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random q, k, v and output gradient in the network's layout: v is a view of the fused qkv, the class's q, k are 0."""
    g = torch.Generator().manual_seed(size + head_dim)
    qkv = torch.randn(batch, size, 3, heads, head_dim, generator=g)
    qkv[:, 0, :2] = 0
    grad = torch.randn(batch, size, heads, head_dim, generator=g).to(device, dtype).transpose(1, 2)
    q, k, v = qkv.to(device, dtype).permute(2, 0, 3, 1, 4)  # (B, H, S, d) each
    return [q.contiguous(), k.contiguous(), v, grad]


def results(attend: Any, inputs: list[Tensor], spec: MaskSpec, grad: bool = True) -> list[Tensor]:
    """The output and, with ``grad``, the gradients of q, k, v."""
    q, k, v, g = inputs
    leaves = [t.detach().requires_grad_(grad) for t in (q, k, v)]
    out = attend(*leaves, spec)
    return [out.detach(), *(torch.autograd.grad(out, leaves, g.to(out.dtype)) if grad else ())]


def errors(attend: Any, inputs: list[Tensor], spec: MaskSpec, exact: list[Tensor]) -> list[float]:
    """The largest error of the output and of each gradient that ``exact`` holds."""
    got = results(attend, inputs, spec, grad=len(exact) > 1)
    return [(a.double() - b).abs().max().item() for a, b in zip(got, exact, strict=True)]


def compare(
    names: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    shapes: list[tuple[int, int, int, int]],
    patterns: tuple[str, ...] = tuple(PATTERNS),
    grad: bool = True,
) -> Iterator[dict[str, Any]]:
    """A row for each backend, pattern and shape (B, H, S, d): its errors, the allowed ones, and why it was left out.

    Allowed for sdpa: 8 roundings of the largest number (64 in fp32); for the others: twice sdpa's error in that precision.
    """
    for shape in shapes:
        for which in patterns:
            spec = example(which, shape[0], shape[2])
            inputs = draw(*shape, dtype, device)
            exact = results(exact_attention, [t.double() for t in inputs], spec, grad)
            own = errors(backend("sdpa").attention, inputs, spec, exact)
            roundings = 8 if torch.finfo(dtype).bits == 16 else 64
            bound = [roundings * torch.finfo(dtype).eps * t.abs().max().item() for t in exact]
            for name in names:
                module = backend(name)
                row: dict[str, Any] = {
                    "backend": name, "pattern": which, "size": shape[2], "head_dim": shape[3],
                    "dtype": str(dtype).removeprefix("torch."),
                }  # fmt: skip
                why = module.missing() or module.supports(spec, dtype, shape[3], device, grad)
                if why is not None:
                    yield row | {"ok": None, "why": why}
                    continue
                allowed = bound if name == "sdpa" else [2 * e for e in own]
                try:
                    measured = own if name == "sdpa" else errors(module.attention, inputs, spec, exact)
                except Exception as error:  # one broken kernel must not hide the results of the others
                    yield row | {"ok": False, "why": f"{type(error).__name__}: {error}"}
                    continue
                ok = all(e <= a for e, a in zip(measured, allowed, strict=True))
                yield row | {"ok": ok, "errors": dict(zip(RESULTS, measured, strict=False)), "allowed": allowed}


def backends() -> dict[str, str | None]:
    """Each backend, and why it is not available (None: it is)."""
    return {name: backend(name).missing() for name in NAMES}
