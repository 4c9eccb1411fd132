"""Attention by the Triton kernels of triton_jit.py: any mask, bf16, fp16 and fp32, head dimensions up to 128, any S."""

from __future__ import annotations

import functools
import math
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megastar.model.kernels.tiles import tiles
from megastar.model.masks import MaskSpec

LOG2E = 1.4426950408889634


@functools.cache
def missing() -> str | None:
    try:
        import triton
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton (Linux)"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests: the variable must be set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str | None:
    if device.type != "cuda" and not interpreted():
        return f"it runs on CUDA GPUs, not on {device.type}: use sdpa there"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it requires Ampere (compute capability 8.0) or later: use sdpa"
    if dtype not in ((torch.bfloat16,) if device.type == "cuda" else ()) + (torch.float16, torch.float32):
        return f"it does not support {dtype}: use bf16 on a GPU, fp32, or sdpa"
    if not 16 <= head_dim <= 128:
        return f"head dimension {head_dim} is outside 16..128: use sdpa"
    return None


class Config(NamedTuple):
    """Tiles of a kernel: BM queries x BN keys, warps and software-pipeline stages."""

    BM: int
    BN: int
    warps: int
    stages: int


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def configs(head_dim: int, dtype: torch.dtype, size: int) -> dict[str, Config]:
    """For each kernel, at ``size`` positions, what compiles with few or no spills on sm_80 and sm_90; not yet tuned on a GPU."""
    wide = padded(head_dim) > 64
    if dtype == torch.float32:
        if wide:
            return {"forward": Config(32, 32, 8, 1), "dq": Config(16, 32, 8, 1), "dkv": Config(16, 16, 8, 1)}
        return {"forward": Config(64, 32, 8, 1), "dq": Config(32, 32, 8, 1), "dkv": Config(32, 32, 8, 1)}
    forward = Config(128, 64, 8, 2) if wide else Config(128, 64, 4, 3)
    if size % forward.BM:  # for example 576: half of the last tile would be empty, and its bounds check costs registers
        forward = Config(64, 64, 8 if wide else 4, 2)
    return {
        "forward": forward,
        "dq": Config(64, 64, 8, 2) if wide else Config(64, 64, 4, 2),
        "dkv": Config(64, 64, 8, 2) if wide else Config(64, 64, 4, 2),
    }


def mask_options(spec: MaskSpec) -> dict[str, Any]:
    """A mask's properties as the kernels' compile-time constants."""
    w = spec.window
    return {
        "PLAIN": spec.is_plain_causal,
        "SHARED": all(t is None or t.shape[0] == 1 for t in (spec.start, spec.end)),
        "START": spec.start is not None,
        "END": spec.end is not None,
        "WIDTH": w.width if w else 0,
        "ROWS": w.rows if w else 0,
        "COLUMNS": w.columns if w else 0,
    }


def attention(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
    """As ``sdpa.attention``, with S = L."""
    return _Attention.apply(*map(aligned, (q, k, v)), spec)


def aligned(t: Tensor) -> Tensor:
    """(B, H, S, d) with the strides that the kernels assume; the network's own tensors are returned unchanged."""
    step = t.shape[-1] & -t.shape[-1]
    return t if t.stride(-1) == 1 and not any(s % step for s in t.stride()[:3]) else t.contiguous()


class _Launch:
    """Arguments common to the kernels of one call."""

    def __init__(self, q: Tensor, spec: MaskSpec):
        self.batch, self.heads, self.size, self.d = q.shape
        spec.check_size(self.size)
        rows = {t.shape[0] for t in (spec.start, spec.end) if t is not None}
        assert rows <= {1, self.batch}, (rows, self.batch)
        self.spec, self.q, self.configs = spec.to(q.device), q, configs(self.d, q.dtype, self.size)
        # If only one of the two is shared by all sequences, it is expanded too.
        self.start, self.end = (self._expand(t, max(rows, default=1)) for t in (self.spec.start, self.spec.end))

    def _expand(self, t: Tensor | None, rows: int) -> Tensor:
        return self.q if t is None else t.expand(rows, -1).contiguous()  # q: any pointer, it is not read

    def tiles(self, c: Config, by_key: bool) -> tuple[Any, ...]:
        """full, visited, order, and the number of tiles on this side and the other."""
        m, n = -(-self.size // c.BM), -(-self.size // c.BN)
        counts = (n, m) if by_key else (m, n)
        if self.spec.is_plain_causal:
            return (self.q, self.q, self.q, *counts)
        return (*tiles(self.spec, self.size, c.BM, c.BN, self.q.device)[by_key], *counts)

    def options(self, c: Config) -> dict[str, Any]:
        return {
            "D": self.d, "BD": padded(self.d), "BM": c.BM, "BN": c.BN,
            "EVEN": self.size % c.BM == 0 and self.size % c.BN == 0,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": c.warps, "num_stages": c.stages, **mask_options(self.spec),
        }  # fmt: skip

    def on_device(self) -> Any:
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
        from megastar.model.kernels import triton_jit as jit

        call = _Launch(q, spec)
        B, H, S, d = q.shape
        # The layout of the output projection's input: out.transpose(1, 2).flatten(2) copies nothing.
        out = q.new_empty(B, S, H, d).transpose(1, 2)
        lse = torch.empty(B * H, S, dtype=torch.float32, device=q.device)
        c = call.configs["forward"]
        with call.on_device():
            jit.forward[(-(-S // c.BM) * B * H,)](
                q, k, v, out, lse, call.start, call.end, *call.tiles(c, False)[:3], LOG2E / math.sqrt(d), S, H,
                *call.tiles(c, False)[3:], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                **call.options(c),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec = spec
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from megastar.model.kernels import triton_jit as jit

        q, k, v, out, lse = ctx.saved_tensors
        call = _Launch(q, ctx.spec)
        B, H, S, d = q.shape
        grad = aligned(grad)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dot = torch.empty_like(lse)
        scales = LOG2E / math.sqrt(d), 1 / math.sqrt(d)
        inputs = [s for t in (q, k, v, grad) for s in t.stride()[:3]]
        with call.on_device():
            c = call.configs["forward"]
            jit.delta[(-(-S // c.BM) * B * H,)](
                out, grad, dot, S, H, -(-S // c.BM), *out.stride()[:3], *grad.stride()[:3],
                D=d, BD=padded(d), BM=c.BM, EVEN=S % c.BM == 0, num_warps=c.warps,
            )  # fmt: skip
            c = call.configs["dq"]
            lists = call.tiles(c, False)
            jit.backward_dq[(-(-S // c.BM) * B * H,)](
                q, k, v, grad, lse, dot, dq, call.start, call.end, *lists[:3], *scales, S, H, *lists[3:],
                *inputs, *dq.stride()[:3], **call.options(c),
            )  # fmt: skip
            c = call.configs["dkv"]
            lists = call.tiles(c, True)
            jit.backward_dkv[(-(-S // c.BN) * B * H,)](
                q, k, v, grad, lse, dot, dk, dv, call.start, call.end, *lists[:3], *scales, S, H, *lists[3:],
                *inputs, *dk.stride()[:3], *dv.stride()[:3], **call.options(c),
            )  # fmt: skip
        return dq, dk, dv, None
