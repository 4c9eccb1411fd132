"""The network as the sampler runs it: the same weights, on a CPU laid out once for oneDNN's matrix products."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
ROWS = 32  # the layout's hint; the same for every batch, so that a row's sum has one order whatever rows come with it


class PackedLinear(nn.Module):
    """``nn.Linear`` without a bias whose weight is kept in oneDNN's own layout: x (..., in) -> (..., out).

    torch's ``F.linear`` hands fp32 to MKL, which on AMD is 2 to 3 times slower at the few rows of a decode step.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.bias is None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def decoding_copy(model: M) -> M:
    """The network in eval mode, its parameters shared with ``model``, which stays as it is.

    On a CPU in fp32 or bf16 the linear layers hold a second, packed copy of their weights (its memory is that of the
    weights) where this torch has oneDNN; elsewhere nothing is copied.
    """
    weight = next(model.parameters())
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    packs = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and has_onednn
    with torch.no_grad():
        return _twin(model, packs).eval()


def _twin(module: M, packs: bool) -> M:
    twin = copy.copy(module)  # its own attributes, the same parameters
    twin._modules = {}
    for name, child in module._modules.items():
        plain = isinstance(child, nn.Linear) and child.bias is None and not child._forward_hooks
        twin._modules[name] = PackedLinear(child) if packs and plain else child and _twin(child, packs)
    return twin
