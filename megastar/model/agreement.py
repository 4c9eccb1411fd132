"""Compares a fast operation with its reference on a part of the real inputs, before its result is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megastar.errors import UserError


def disagreement(
    fast: Callable[..., Any],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    label: str,
    grad: bool,
    whole: bool = False,
) -> str | None:
    """None if both agree on ``inputs``, else what is wrong; ``names``: of the output and of each input's gradient.

    Both are compared with ``reference`` in fp64. The largest error of the output, and with ``grad`` of each gradient, may
    be three times that of ``reference`` in the inputs' own precision, plus a floor for the rounding common to both.
    ``whole``: ``fast`` is given the gradient of the output instead, and returns the output and the gradients of ``inputs``.
    """
    # Hidden from activation checkpointing, which counts saved tensors, and from inference mode.
    identity = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), identity:
        inputs = [t.detach().clone() for t in inputs]
        g = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).to(inputs[0])

        def results(operation: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
            leaves = [t.detach().requires_grad_(grad) for t in inputs]
            out = operation(*(t * 1 for t in leaves))  # an operation may overwrite its inputs, but not leaves
            return [out.detach(), *(torch.autograd.grad(out, leaves, g.to(out.dtype)) if grad else ())]

        try:
            got = fast(g) if whole else results(fast, inputs)
        except UserError:
            raise
        except Exception as error:  # of a compiler, a driver or a library: the run continues with the reference
            lines = str(error).strip().splitlines()
            return f"failed ({type(error).__name__}: {lines[0] if lines else ''})"
        exact = results(reference, [t.double() for t in inputs])
        usual = results(reference, inputs)
    for name, a, b, c in zip(names, got, exact, usual, strict=False):
        difference, own = (a.double() - b).abs().max().item(), (c.double() - b).abs().max().item()
        allowed = 3 * own + 4 * torch.finfo(inputs[0].dtype).eps * b.abs().max().item()
        if not difference <= allowed:  # true for NaN too
            return f"differs from {label} ({name} off by {difference:.2g}, {allowed:.2g} is allowed)"
    return None
