"""Who attends to whom, recomputed with plain products from each block's input: maps, and how far they reach.

B pictures, S positions, T image tokens, H heads, d head dimension. Position 0 is the class, position p > 0 holds token
p - 1 and predicts token p.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megastar.model.masks import MaskSpec
from megastar.model.rope import apply_rope, rope_table
from megastar.model.transformer import Transformer, TransformerBlock


def block_attention(block: TransformerBlock, x: Tensor, rope: Tensor, mask: MaskSpec) -> Tensor:
    """The weights of one block on its input x (B, S, D): (B, H, S, S), rows are queries and sum to 1; fp32, or fp64 for
    fp64 inputs. The same as attention.py and the kernels compute, but these never hold the weights."""
    attention = block.attention
    qkv = attention.wqkv(block.attention_norm(x)).unflatten(-1, (3, -1, attention.head_dim))  # (B, S, 3, H, d)
    q, k = apply_rope(qkv[:, :, :2].permute(2, 0, 3, 1, 4), rope).unbind()  # (B, H, S, d) each
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = q.to(wide) @ k.to(wide).transpose(-1, -2) * attention.head_dim**-0.5  # (B, H, S, S)
    weights: Tensor = logits.masked_fill(~mask.dense(x.shape[1], x.device), float("-inf")).softmax(-1)
    return weights


@torch.no_grad()
def attention_maps(
    model: Transformer, labels: Tensor, tokens: Tensor, mask: MaskSpec | None = None
) -> Iterator[Tensor]:
    """Each block's weights (B, H, S, S) in turn, for labels (B,) and tokens (B, S - 1); ``mask`` None: plain causal.

    The model must be in eval mode: dropout would blur what is shown.
    """
    assert not model.training
    cfg, mask = model.cfg, mask or MaskSpec.causal()
    h = torch.cat([model.cls_embedding(labels), model.tok_embeddings(tokens)], 1)  # (B, S, D)
    kind = torch.complex128 if h.dtype == torch.float64 else torch.complex64
    rope = rope_table(cfg.grid, cfg.head_dim, cfg.rope_base, h.device, kind)[: h.shape[1]]
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        yield block_attention(block, h, rope, mask)
        h = block(h, rope=rope, mask=mask)


def token_distances(grid: int, size: int) -> Tensor:
    """Euclidean distance between the tokens that positions 1 ... size - 1 hold, in tokens: (size - 1, size - 1) fp64."""
    at = torch.arange(size - 1)
    places = torch.stack([at // grid, at % grid], -1).double()  # (S - 1, 2) row, column
    return (places[:, None] - places[None]).square().sum(-1).sqrt()


def mean_distances(weights: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """How far each head attends, from weights (B, H, S, S): (H,) mean distance in tokens, and (H,) the class's share.

    Distance: sum over keys of weight x Euclidean distance in the token grid, averaged over pictures and queries. The class has
    no place in the grid: it is left out as a query, and as a key, where the other weights are scaled to sum to 1.
    """
    w = weights[:, :, 1:, 1:].double()  # (B, H, S - 1, S - 1)
    rest = w.sum(-1)
    away = (w * token_distances(grid, weights.shape[-1]).to(w.device)).sum(-1) / rest.clamp(min=1e-30)
    return away.mean((0, 2)), weights[:, :, 1:, 0].double().mean((0, 2))


def uniform_distance(grid: int, size: int) -> float:
    """``mean_distances`` of a head that attends to all it may see alike: the yardstick."""
    alike = torch.ones(size, size, dtype=torch.float64).tril()
    return float(mean_distances((alike / alike.sum(-1, keepdim=True))[None, None], grid)[0][0])


@dataclass
class Reach:
    """How far the heads of a network attend."""

    distances: list[list[float]]  # block, head: tokens
    class_shares: list[list[float]]  # block, head
    uniform: float
    pictures: int

    @property
    def means(self) -> list[float]:
        """Of each block's heads."""
        return [sum(heads) / len(heads) for heads in self.distances]


def reach_of(model: Transformer, labels: Tensor, tokens: Tensor, batch: int = 4) -> Reach:
    """Plain causal attention over labels (B,) and tokens (B, S - 1), some pictures at a time."""
    sums: list[list[Tensor]] = []
    for first in range(0, len(labels), batch):
        some = slice(first, first + batch)
        count = len(labels[some])
        for i, weights in enumerate(attention_maps(model, labels[some], tokens[some])):
            found = [count * value.cpu() for value in mean_distances(weights, model.cfg.grid)]
            if first == 0:
                sums.append(found)
            else:
                sums[i] = [a + b for a, b in zip(sums[i], found, strict=True)]
    means = [[(value / len(labels)).tolist() for value in pair] for pair in sums]
    away = uniform_distance(model.cfg.grid, tokens.shape[1] + 1)
    return Reach([distance for distance, _ in means], [share for _, share in means], away, len(labels))


def shown_blocks(count: int, most: int, always: int) -> list[int]:
    """At most ``most`` (2 or more) of the blocks 1 ... count, evenly spaced from the first to the last; ``always`` is
    among them."""
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


def masked_picture(
    model: Transformer, label: int, tokens: Tensor, hidden: Tensor, most: int, block: int
) -> dict[str, Any]:
    """What the page shows of one picture's tokens (S - 1,): each shown block's weights, mean of its heads, plain causal
    and with the keys ``hidden`` (S,) bool; ``block`` is always shown."""
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
