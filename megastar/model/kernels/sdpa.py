"""The reference backend: torch's fused kernel, or two matrix products where they are faster (short, bf16 on CPU).

On a GPU torch chooses among its kernels by their order of priority, which on Hopper begins with cuDNN: for causal, masked and
single-query shapes alike. cuDNN builds a plan for each length of the keys, 255 of them in one image. It is therefore disabled
when this module is imported, once per process; what remains is flash, then memory-efficient (the only one with a mask), then
math. A context manager around each call would cost 20 us of host time, and this switch also holds while blocks are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.masks import MaskSpec

torch.backends.cuda.enable_cudnn_sdp(False)
_plain = MaskSpec()
# The CPU kernel of F.scaled_dot_product_attention accepts a mask together with is_causal, the function itself does not:
# with both, the upper triangle is skipped and a mask is nearly free.
_cpu_kernel: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None
)

# bf16 on CPU, forward and backward: the two products take 0.6 of the fused kernel's time at 256 positions, 0.8 at 576,
# 1.1 at 768, 1.2 at 1280.
PRODUCTS = 640


def missing() -> str | None:
    return None


def supports(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str | None:
    return None


def form(spec: MaskSpec, like: Any) -> tuple[Tensor | None, bool]:
    """The additive mask (B or 1, 1, S, S) or None, and whether it is causal."""
    size = like.shape[2]
    bias = None if spec.is_plain_causal else spec.additive(size, like.device, like.dtype)
    if bias is None and size > 1 and _by_products(like, size):
        bias = _plain.additive(size, like.device, like.dtype)
    return bias, not spec.is_plain_causal and spec.is_causal


def _by_products(q: Any, keys: int) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= PRODUCTS


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; causal without a mask.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions, so a single query sees
    all keys. ``mask`` requires S = L. Returns (B, H, S, d).
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return attend(q, k, v, form(mask or _plain, q))
    assert mask is None or mask.is_plain_causal, "masks are for training: no cache"
    return attend(
        q, k, v, (_plain.additive(keys, q.device, q.dtype)[..., -queries:, :] if queries > 1 else None, False)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, form: tuple[Tensor | None, bool]) -> Tensor:
    bias, causal = form
    if _by_products(q, k.shape[2]):
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, S, L)
        return torch.softmax(logits if bias is None else logits.add_(bias), -1) @ v
    both = q.device.type == "cpu" and bias is not None and causal and q.dtype != torch.float16
    if both and _cpu_kernel is not None and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return _cpu_kernel(q, k, v, 0.0, True, attn_mask=bias)[0]
    if q.is_cuda and bias is not None and q.element_size() == 2:
        return _padded_to_eights(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and q.shape[2] > 1)


def kernel(dtype: torch.dtype, head_dim: int, size: int, kind: str, device: torch.device) -> str:
    """``sdpa`` and the kernel that torch uses on a GPU, such as ``sdpa (flash)``."""
    if device.type != "cuda":
        return "sdpa"
    from torch.nn.attention import SDPBackend

    plain = kind == _plain.kind
    q = torch.empty(1, 1, size, head_dim if plain else -(-head_dim // 8) * 8, dtype=dtype, device=device)
    bias = None if plain else q.new_zeros(1, 1, size, size)
    choice = torch._fused_sdp_choice(q, q, q, bias, 0.0, plain)
    return f"sdpa ({SDPBackend(choice).name.removesuffix('_ATTENTION').lower()})"


def _padded_to_eights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """With zeros appended to the head dimension: torch's memory-efficient kernel, the only one on a GPU that accepts a mask,
    needs multiples of 16 bytes; head dimension 100 would fall back to a kernel that holds all logits."""
    d = q.shape[-1]
    if d % 8:
        q, k, v = (F.pad(t, (0, -d % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=d**-0.5)[..., :d]
