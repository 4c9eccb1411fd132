"""The reference backend: torch's fused kernel, or two matrix products where they are faster (short, bf16 on CPU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.masks import MaskSpec

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


def attention(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; causal without a mask.

    q (B, H, S, d); k, v (B, H, L, d) with L >= S: the queries are the last S of the L positions, so a single query sees
    all keys. ``mask`` requires S = L. Returns (B, H, S, d).
    """
    queries, keys = q.shape[2], k.shape[2]
    bias = None
    if mask is not None and not mask.is_plain_causal:
        assert queries == keys, "masks are for training: no cache"
        bias = mask.additive(keys, q.device, q.dtype)  # (B or 1, 1, S, S)
    on_cpu = q.device.type == "cpu"
    by_products = on_cpu and q.dtype == torch.bfloat16 and keys <= PRODUCTS
    if bias is None and queries > 1 and (by_products or queries != keys):
        bias = _plain.additive(keys, q.device, q.dtype)[..., -queries:, :]
    if by_products:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, S, L)
        return torch.softmax(logits if bias is None else logits.add_(bias), -1) @ v
    both = on_cpu and bias is not None and mask is not None and mask.is_causal and q.dtype != torch.float16
    if both and _cpu_kernel is not None and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return _cpu_kernel(q, k, v, 0.0, True, attn_mask=bias)[0]
    if q.is_cuda and bias is not None and q.element_size() == 2:
        return _padded_to_eights(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and queries > 1)


def _padded_to_eights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """With zeros appended to the head dimension: torch's memory-efficient kernel, the only one on a GPU that accepts a mask,
    needs multiples of 16 bytes; head dimension 100 would fall back to a kernel that holds all logits."""
    d = q.shape[-1]
    if d % 8:
        q, k, v = (F.pad(t, (0, -d % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=d**-0.5)[..., :d]
