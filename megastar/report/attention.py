"""Attention maps, recomputed with plain products from each block's input, and mean attention distances.

B images, S positions, T image tokens, H heads, d head dimension. Position 0 is the class, position p > 0 holds token
p - 1 and predicts token p.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megastar.model.masks import MaskSpec
from megastar.model.rope import apply_rope
from megastar.model.transformer import Transformer, TransformerBlock


def block_attention(block: TransformerBlock, x: Tensor, rope: Tensor, mask: MaskSpec) -> Tensor:
    """The attention weights of a block for its input x (B, S, D): (B, H, S, S), rows are queries and sum to 1; fp32, or
    fp64 for fp64 inputs. The kernels compute the same without storing the weights."""
    attention = block.attention
    qkv = attention.wqkv(block.attention_norm(x)).unflatten(-1, (3, -1, attention.head_dim))  # (B, S, 3, H, d)
    q, k = apply_rope(qkv[:, :, :2].permute(2, 0, 3, 1, 4), rope).unbind()  # (B, H, S, d) each
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = q.to(wide) @ k.to(wide).transpose(-1, -2) * attention.head_dim**-0.5  # (B, H, S, S)
    hidden = ~mask.dense(x.shape[1], x.device)
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), -1)


@torch.no_grad()
def attention_maps(
    model: Transformer, labels: Tensor, tokens: Tensor, mask: MaskSpec | None = None
) -> Iterator[Tensor]:
    """Yields the weights (B, H, S, S) of each block, for labels (B,) and tokens (B, S - 1); ``mask`` None: causal. A network
    of random order reads the tokens in raster order.

    The model must be in eval mode, without dropout.
    """
    assert not model.training
    mask = mask or MaskSpec.causal()
    h, rope = model.embed(labels, tokens)  # (B, S, D)
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        yield block_attention(block, h, rope, mask)
        h = block(h, rope=rope, mask=mask)


def token_distances(grid: int, size: int) -> Tensor:
    """Euclidean distance in the token grid between positions 1 ... size - 1: (size - 1, size - 1) fp64."""
    at = torch.arange(size - 1)
    places = torch.stack([at // grid, at % grid], -1).double()  # (S - 1, 2) row, column
    return (places[:, None] - places[None]).square().sum(-1).sqrt()


def mean_distances(weights: Tensor, grid: int) -> Tensor:
    """The mean attention distance in tokens of each head: (H,), from weights (B, H, S, S).

    Sum over keys of weight x Euclidean distance in the token grid, averaged over images and queries. The class has no
    position in the grid: it is excluded as a query and as a key; the other weights are rescaled to sum to 1.
    """
    w = weights[:, :, 1:, 1:].double()  # (B, H, S - 1, S - 1)
    distances = (w * token_distances(grid, weights.shape[-1]).to(w.device)).sum(-1) / w.sum(-1).clamp(min=1e-30)
    return distances.mean((0, 2))


def uniform_distance(grid: int, size: int) -> float:
    """``mean_distances`` of a head that attends uniformly to all visible keys, for comparison."""
    uniform = torch.ones(size, size, dtype=torch.float64).tril()
    return float(mean_distances((uniform / uniform.sum(-1, keepdim=True))[None, None], grid))


def attention_distances(model: Transformer, labels: Tensor, tokens: Tensor, batch: int = 4) -> Tensor:
    """``mean_distances`` of each block (L, H), causal, over labels (N,) and tokens (N, S - 1), in batches of images."""
    total = torch.zeros(())
    for some in torch.arange(len(labels), device=labels.device).split(batch):
        maps = attention_maps(model, labels[some], tokens[some])
        total = total + len(some) * torch.stack([mean_distances(weights, model.cfg.grid).cpu() for weights in maps])
    return total / len(labels)


def shown_blocks(count: int, most: int, always: int) -> list[int]:
    """At most ``most`` (2 or more) of the blocks 1 ... count, evenly spaced, including the first, the last and ``always``."""
    if count <= most:
        return list(range(1, count + 1))
    blocks = {round(1 + i * (count - 1) / (most - 1)) for i in range(most)}
    if always not in blocks and 1 <= always <= count:
        inner = sorted(blocks - {1, count} or blocks)
        blocks = blocks - {min(inner, key=lambda b: abs(b - always))} | {always}
    return sorted(blocks)


def pack_maps(maps: list[Tensor]) -> str:
    """Weights (S, S) of several blocks -> base64 of deflated bytes round(255 sqrt(weight)), which the page unpacks."""
    raw = torch.stack(maps).float().clamp(0, 1).sqrt().mul(255).round().to(torch.uint8).cpu()
    return base64.b64encode(zlib.compress(raw.numpy().tobytes(), 9)).decode()


def masked_attention(
    model: Transformer, label: int, tokens: Tensor, hidden: Tensor, most: int, block: int
) -> dict[str, Any]:
    """The maps of one image with tokens (S - 1,) for the page: weights of at most ``most`` blocks, including ``block``,
    averaged over heads; causal, and with the keys ``hidden`` (S,) bool."""
    device = tokens.device
    labels, tokens = torch.tensor([label], device=device), tokens[None]
    shown = shown_blocks(model.cfg.n_layer, most, block)

    def means(mask: MaskSpec) -> list[Tensor]:
        found = enumerate(attention_maps(model, labels, tokens, mask), 1)
        return [weights[0].mean(0) for i, weights in found if i in shown]

    return {
        "blocks": shown,
        "size": len(hidden),
        "grid": model.cfg.grid,
        "hidden": hidden.nonzero().flatten().tolist(),
        "plain": pack_maps(means(MaskSpec.causal())),
        "masked": pack_maps(means(MaskSpec.hidden(hidden[None].to(device)))),
    }
