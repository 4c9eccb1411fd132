"""RoPE (model/rope.py) of q and k straight out of the fused qkv, by one Triton kernel. Its gradient is the rotation by the
negative angles, written with v's straight into the gradient of qkv. Importing this module requires Triton.

B batch, S sequence, H heads, d head dimension. A program handles ROWS pairs of a position and a head of one sequence.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megastar.model.kernels.triton import aligned, padded

ELEMENTS = 2048  # of a program's tile


@triton.jit
def place(b, s, h, sb, ss, sh, D: tl.constexpr):
    """Offsets of rows: all strides are multiples of the largest power of two in D (see triton_jit.py)."""
    return tl.multiple_of(b * sb + s * ss + h * sh, D & -D)[:, None]


@triton.jit
def rotated(x, cos, sin):
    first, second = tl.split(tl.reshape(x.to(tl.float32), (cos.shape[0], cos.shape[1], 2)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(turned, (cos.shape[0], 2 * cos.shape[1]))


@triton.jit
def rotate(
    Q, K, V, OQ, OK, OV, TABLE, size, heads, tiles, sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotate Q and K (B, S, H, d, any strides but of d) by TABLE (S, d / 2, 2) into OQ and OK of equal strides; backwards
    by the negative angles, with a copy of V to OV."""
    program = tl.program_id(0)
    b, row = (program // tiles).to(tl.int64), program % tiles * ROWS + tl.arange(0, ROWS)
    s, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d = tl.arange(0, BD)[None, :]
    inside = (row < size * heads)[:, None] & (d < D)
    table = tl.load(TABLE + place(b, s, h, 0, D, 0, D) + d, mask=inside, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (ROWS, BD // 2, 2)))
    if BACKWARD:
        sin = -sin
    out = place(b, s, h, sob, sos, soh, D) + d
    q = tl.load(Q + place(b, s, h, sqb, sqs, sqh, D) + d, mask=inside, other=0.0)
    tl.store(OQ + out, rotated(q, cos, sin).to(OQ.dtype.element_ty), mask=inside)
    k = tl.load(K + place(b, s, h, skb, sks, skh, D) + d, mask=inside, other=0.0)
    tl.store(OK + out, rotated(k, cos, sin).to(OK.dtype.element_ty), mask=inside)
    if BACKWARD:
        v = tl.load(V + place(b, s, h, svb, svs, svh, D) + d, mask=inside, other=0.0)
        tl.store(OV + out, v, mask=inside)


def launch(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], table: Tensor, backward: bool) -> None:
    """q, k, v -> q, k, v (B, H, S, d) each; forward, v is neither read nor written."""
    q = inputs[0]
    batch, heads, size, d = q.shape
    width = padded(d)
    rows = ELEMENTS // width
    tiles = -(-size * heads // rows)
    strides = [t.stride(axis) for t in (*inputs, outputs[0]) for axis in (0, 2, 1)]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        rotate[(tiles * batch,)](
            *inputs,
            *outputs,
            table,
            size,
            heads,
            tiles,
            *strides,
            D=d,
            BD=width,
            ROWS=rows,
            BACKWARD=backward,
            num_warps=4,
        )


class SplitQKV(torch.autograd.Function):
    """qkv (B, S, 3, H, d), table (S, d / 2, 2) in fp32 -> q and k, rotated, and v, a view: (B, H, S, d) each."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Positions before heads in memory: attention's output follows q, and wo reads it without a copy.
        out = torch.empty((2, *qkv.shape[:2], *qkv.shape[3:]), dtype=qkv.dtype, device=qkv.device).transpose(2, 3)
        launch((q, k, v), (out[0], out[1], v), table, False)
        ctx.save_for_backward(table)
        return out[0], out[1], v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        B, H, S, d = grads[0].shape
        out = torch.empty((B, S, 3, H, d), dtype=grads[0].dtype, device=grads[0].device)
        dq, dk, dv = out.permute(2, 0, 3, 1, 4)
        (table,) = ctx.saved_tensors
        launch(tuple(map(aligned, grads)), (dq, dk, dv), table, True)
        return out, None
