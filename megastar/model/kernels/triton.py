"""Attention by the Triton kernels of triton_jit.py: any mask, bf16, fp16 and fp32, head dimensions up to 128, any S."""

from __future__ import annotations

import functools
import math
import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megastar.model.kernels.tiles import tiles
from megastar.model.masks import MaskSpec, Window

_plain = MaskSpec()
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


class Form(NamedTuple):
    """A mask on the device: the intervals (R or 1, S), the tiles that each kernel visits, and the window."""

    start: Tensor | None
    end: Tensor | None
    tiles: list[Tensor]  # full, visited and order, of the forward, dq and dkv kernels; none if plain causal
    window: list[int]  # width, rows and columns; 0: none


def form(spec: MaskSpec, like: Any) -> Form:
    batch, _, size, d = like.shape
    spec.check_size(size)
    rows = {t.shape[0] for t in (spec.start, spec.end) if t is not None}
    assert rows <= {1, batch}, (rows, batch)

    def make() -> Form:
        # If only one of the two is shared by all sequences, it is expanded too.
        at = spec.to(like.device)
        start, end = (None if t is None else t.expand(max(rows), -1).contiguous() for t in (at.start, at.end))
        c = configs(d, like.dtype, size)
        lists: list[Tensor] = []
        for name in () if spec.is_plain_causal else ("forward", "dq", "dkv"):
            lists += tiles(at, size, c[name].BM, c[name].BN, like.device)[name == "dkv"]
        w = spec.window
        return Form(start, end, lists, [w.width, w.rows, w.columns] if w else [0, 0, 0])

    return spec.cached(("triton", size, d, like.dtype, like.device), make)


def attend(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Tensor:
    out: Tensor = _forward(q, k, v, *form)[0]
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """As ``sdpa.attention``, with S = L."""
    return attend(q, k, v, form(mask or _plain, q))


def aligned(t: Tensor) -> Tensor:
    """(B, H, S, d) with the strides that the kernels assume; the network's own tensors are returned unchanged."""
    step = t.shape[-1] & -t.shape[-1]
    return t if t.stride(-1) == 1 and not any(s % step for s in t.stride()[:3]) else t.contiguous()


class _Launch:
    """Arguments common to the kernels of one call."""

    def __init__(self, q: Tensor, form: Form):
        self.batch, self.heads, self.size, self.d = q.shape
        self.q, self.form, self.configs = q, form, configs(self.d, q.dtype, self.size)
        self.spec = MaskSpec(form.end, form.start, Window(*form.window) if form.window[0] else None, trusted=True)
        self.start, self.end = (q if t is None else t for t in (form.start, form.end))  # q: any pointer, it is not read

    def tiles(self, name: str) -> tuple[Any, ...]:
        """full, visited, order, and the number of tiles on this side and the other."""
        c, at = self.configs[name], 3 * ("forward", "dq", "dkv").index(name)
        m, n = -(-self.size // c.BM), -(-self.size // c.BN)
        lists = self.form.tiles[at : at + 3] or (self.q,) * 3
        return (*lists, *((n, m) if name == "dkv" else (m, n)))

    def options(self, c: Config) -> dict[str, Any]:
        return {
            "D": self.d, "BD": padded(self.d), "BM": c.BM, "BN": c.BN,
            "EVEN": self.size % c.BM == 0 and self.size % c.BN == 0,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": c.warps, "num_stages": c.stages, **mask_options(self.spec),
        }  # fmt: skip

    def on_device(self) -> Any:
        return torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext()


# Custom operators, so that a compiled block contains them without a graph break: all they read are tensors and numbers.
_MASK = "Tensor? start, Tensor? end, Tensor[] tiles, int[] window"


@torch.library.custom_op(
    "megastar::triton_attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)"
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, tiles: list[Tensor], window: list[int]
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp in base 2 (B * H, S)."""
    from megastar.model.kernels import triton_jit as jit

    q, k, v = map(aligned, (q, k, v))
    call = _Launch(q, Form(start, end, tiles, window))
    B, H, S, d = q.shape
    # The layout of the output projection's input: out.transpose(1, 2).flatten(2) copies nothing.
    out = q.new_empty(B, S, H, d).transpose(1, 2)
    lse = torch.empty(B * H, S, dtype=torch.float32, device=q.device)
    c, lists = call.configs["forward"], call.tiles("forward")
    with call.on_device():
        jit.forward[(-(-S // c.BM) * B * H,)](
            q, k, v, out, lse, call.start, call.end, *lists[:3], LOG2E / math.sqrt(d), S, H, *lists[3:],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], **call.options(c),
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, H, S, d = q.shape
    return q.new_empty(B, S, H, d).transpose(1, 2), q.new_empty(B * H, S, dtype=torch.float32)


@torch.library.custom_op(
    "megastar::triton_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    start: Tensor | None, end: Tensor | None, tiles: list[Tensor], window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from megastar.model.kernels import triton_jit as jit

    grad, q, k, v = map(aligned, (grad, q, k, v))
    call = _Launch(q, Form(start, end, tiles, window))
    B, H, S, d = q.shape
    dq, dk, dv = (t.new_empty(B, S, H, d).transpose(1, 2) for t in (q, k, v))
    dot = torch.empty_like(lse)
    scales = LOG2E / math.sqrt(d), 1 / math.sqrt(d)
    inputs = [s for t in (q, k, v, grad) for s in t.stride()[:3]]
    with call.on_device():
        c = call.configs["forward"]
        jit.delta[(-(-S // c.BM) * B * H,)](
            out, grad, dot, S, H, -(-S // c.BM), *out.stride()[:3], *grad.stride()[:3],
            D=d, BD=padded(d), BM=c.BM, EVEN=S % c.BM == 0, num_warps=c.warps,
        )  # fmt: skip
        c, lists = call.configs["dq"], call.tiles("dq")
        jit.backward_dq[(-(-S // c.BM) * B * H,)](
            q, k, v, grad, lse, dot, dq, call.start, call.end, *lists[:3], *scales, S, H, *lists[3:],
            *inputs, *dq.stride()[:3], **call.options(c),
        )  # fmt: skip
        c, lists = call.configs["dkv"], call.tiles("dkv")
        jit.backward_dkv[(-(-S // c.BN) * B * H,)](
            q, k, v, grad, lse, dot, dk, dv, call.start, call.end, *lists[:3], *scales, S, H, *lists[3:],
            *inputs, *dk.stride()[:3], *dv.stride()[:3], **call.options(c),
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, S, d = q.shape
    return tuple(q.new_empty(B, S, H, d).transpose(1, 2) for _ in range(3))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, end, lists, window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, start, end, *lists)
    ctx.window = window


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, start, end, *lists = ctx.saved_tensors
    return *_backward(grad, q, k, v, out, lse, start, end, lists, ctx.window), None, None, [None] * len(lists), None


_forward.register_autograd(_gradients, setup_context=_keep)
