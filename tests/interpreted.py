"""The Triton kernels on the CPU, in Triton's interpreter, against fp64: the environment must hold TRITON_INTERPRET=1.

TRITON_INTERPRET=1 python tests/interpreted.py '[["hidden", 176, 64, "float32"], ...]'        one line of JSON a case

A case names a mask, or "rope" for the rotation of q and k; then positions, head dimension and type.
"""

from __future__ import annotations

import json
import sys

import torch

from megastar.model.kernels import triton as ours
from megastar.model.kernels.check import draw, errors, exact_attention, example, results
from megastar.model.rope import plain_split_qkv, rope_table


def rope_errors(size: int, head_dim: int, dtype: torch.dtype) -> list[float]:
    """The largest errors of q, k, v and of the gradient of qkv, whose parts have strides of a kernel's and of a sum's."""
    from megastar.model.kernels.triton_rope import SplitQKV

    g = torch.Generator().manual_seed(size)
    qkv = torch.randn(2, size, 3, 3, head_dim, generator=g).to(dtype)
    dq, dk = torch.randn(2, 2, size, 3, head_dim, generator=g).to(dtype).transpose(2, 3)
    grads = [dq, dk.contiguous(), dk[..., :1].expand(dk.shape)]
    rows = []
    for split, kind, real in ((SplitQKV.apply, dtype, torch.float32), (plain_split_qkv, torch.float64, torch.float64)):
        leaf = qkv.to(kind).requires_grad_()
        table = rope_table(size, head_dim, 10000.0, leaf.device, real)[:size]
        parts = split(leaf, table)
        assert parts[2].data_ptr() == leaf[:, :, 2].data_ptr()  # v is not copied
        rows.append([*parts, *torch.autograd.grad(parts, leaf, [t.to(kind) for t in grads])])
    return [(a.double() - b).abs().max().item() for a, b in zip(*rows, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for which, size, head_dim, dtype in json.loads(sys.argv[1]):
        if which == "rope":
            print(json.dumps(rope_errors(size, head_dim, getattr(torch, dtype))), flush=True)
            continue
        spec = example(which, 2, size)
        inputs = draw(2, 1, size, head_dim, getattr(torch, dtype), torch.device("cpu"))
        inputs[3] = inputs[3] if size % 64 else inputs[3][..., :1].expand(inputs[3].shape)  # a gradient of stride 0
        exact = results(exact_attention, [t.double() for t in inputs], spec)
        print(json.dumps(errors(ours.attention, inputs, spec, exact)), flush=True)
