"""The network as the sampler runs it: the same weights, on a CPU packed once for oneDNN's matrix products."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
# Hint for the layout; the same for every batch, so that the order of a row's sum does not depend on the batch.
ROWS = 32


class PackedLinear(nn.Module):
    """``nn.Linear`` without a bias, its weight in oneDNN's packed layout: x (..., in) -> (..., out).

    torch's ``F.linear`` uses MKL for fp32, which on AMD is 2 to 3 times slower for the few rows of a decoding step.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.bias is None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def decoding_copy(model: M) -> M:
    """The network in eval mode, its parameters shared with ``model``, which is not changed.

    On a CPU in fp32 or bf16, if torch has oneDNN, the linear layers hold a second, packed copy of their weights; otherwise
    nothing is copied.
    """
    weight = next(model.parameters())
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    packs = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and has_onednn
    with torch.no_grad():
        return _shallow_copy(model, packs).eval()


def _shallow_copy(module: M, packs: bool) -> M:
    """Its own attributes, the same parameters; with ``packs``, packed linear layers."""
    out = copy.copy(module)
    out._modules = {}
    for name, child in module._modules.items():
        if packs and isinstance(child, nn.Linear) and child.bias is None and not child._forward_hooks:
            out._modules[name] = PackedLinear(child)
        else:
            out._modules[name] = None if child is None else _shallow_copy(child, packs)
    return out
