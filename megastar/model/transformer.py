"""LlamaGen's autoregressive image transformer (github.com/FoundationVision/LlamaGen, autoregressive/models/gpt.py).

B batch, S sequence, T image tokens, D width, V vocabulary. The sequence is the class embedding, then the first T - 1
tokens, so S = T in training and output t predicts token t. Weight names and shapes are LlamaGen's.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastar.config.schema import ModelConfig
from megastar.model.attention import Attention, Cache, plan_attention
from megastar.model.factorised import FactorisedHead, SubCodeEmbedding
from megastar.model.fused import swiglu
from megastar.model.kernels import AttentionPlan
from megastar.model.layers import Dropout, Embedding, Head, Linear, RMSNorm
from megastar.model.masks import MaskSpec
from megastar.model.rope import rope_table
from megastar.model.token_order import Placement, placed_rope


class Output(NamedTuple):
    """Result of a forward pass; a field is None if it was not requested."""

    logits: Tensor | None  # (B, S, V), in the weights' dtype; of a factorised head log-probabilities in fp32 or more
    features: Tensor | None  # (B, S, D), output of block ``features_at``
    last: Tensor | None  # (B, S, D), output of the last block that ran, before the final norm
    loss: Tensor | None = None  # mean next-token cross-entropy in nats, in fp32 or more
    aligned: Tensor | None = None  # (B, S, D), output of block ``aligned_at``


class LabelEmbedder(nn.Module):
    """labels (B,) -> (B, 1, D), or (B, S) -> (B, S, D); the last row of the table, num_classes, is the null class."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embedding_table = Embedding(cfg.num_classes + 1, cfg.dim, cfg.initializer_range)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels if labels.ndim > 1 else labels[:, None])


class FeedForward(nn.Module):
    """SwiGLU: x (B, S, D) -> (B, S, D)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w1 = Linear(cfg.dim, cfg.ffn_dim, cfg.initializer_range)
        self.w3 = Linear(cfg.dim, cfg.ffn_dim, cfg.initializer_range)
        self.w2 = Linear(cfg.ffn_dim, cfg.dim, cfg.initializer_range)
        self.ffn_dropout = Dropout(cfg.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(swiglu(self.w1(x), self.w3(x))))


class TransformerBlock(nn.Module):
    """Pre-norm block: x (B, S, D) -> (B, S, D).

    All arguments but x are keyword-only: DeepSpeed's hooks process positional arguments, and only x needs them.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self,
        x: Tensor,
        *,
        rope: Tensor,
        mask: AttentionPlan | MaskSpec | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        start: int = 0,
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), rope=rope, mask=mask, cache=cache, layer=layer, start=start)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The network. Weights are initialized from N(0, initializer_range^2), the head with zeros (torch's generator)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.cls_embedding = LabelEmbedder(cfg)
        whole = cfg.head == "full"
        self.tok_embeddings = (
            Embedding(cfg.vocab_size, cfg.dim, cfg.initializer_range) if whole else SubCodeEmbedding(cfg)
        )
        self.tok_dropout = Dropout(cfg.token_dropout_p)
        self.layers = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = Head(cfg.dim, cfg.vocab_size, std=0.0) if whole else FactorisedHead(cfg)
        if cfg.target_position != "none":  # zeros draw no random numbers: the other weights start as without it
            self.target_embeddings = Embedding(cfg.image_tokens, cfg.dim, std=0.0)

    def forward(
        self,
        labels: Tensor | None,
        tokens: Tensor | None = None,
        mask: MaskSpec | None = None,
        features_at: int | None = None,
        last_block: int | None = None,
        checkpointing: bool = False,
        cache: Cache | None = None,
        start: int = 0,
        need_logits: bool = True,
        targets: Tensor | None = None,
        placement: Placement | None = None,
        aligned_at: int | None = None,
    ) -> Output:
        """labels (B,) with num_classes for the null class, tokens (B, 0..T - 1) -> ``Output`` with S = 1 + tokens; labels
        (B, Q) are as many inputs, queries of a parallel step.

        mask: hidden keys; None is plain causal. features_at, aligned_at: the blocks, counted from 1, whose outputs are returned.
        last_block: stop after that block (no logits). checkpointing: recompute each block in the backward pass.
        cache, start: these are positions start..start + S - 1 and the cache holds the earlier ones; with start > 0
        labels is None and only tokens are embedded. targets (B, S): compute the loss instead of the logits, in chunks
        that never hold all logits. placement: of the S inputs, for a network of random order (``cfg.target_position``),
        whose tokens and targets the caller has permuted; None: raster order. Label dropout is the caller's task.
        """
        cfg = self.cfg
        h, rope = self.embed(labels, tokens, start, placement)
        h = self.tok_dropout(h)
        features, aligned, attend = None, None, None
        if cache is None:
            device = h.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
            attend = plan_attention(cfg, mask, h.shape[0], h.shape[1], h.device, dtype)
        for i, block in enumerate(self.layers):
            if i == last_block:
                break
            run = partial(block, rope=rope, mask=attend, cache=cache, layer=i, start=start)
            recompute = checkpointing and torch.is_grad_enabled()
            h = checkpoint(run, h, use_reentrant=False) if recompute else run(h)
            if i + 1 == features_at:
                features = h
            if i + 1 == aligned_at:
                aligned = h
        whole = last_block is None or last_block >= cfg.n_layer
        logits = loss = None
        if whole and targets is not None:
            loss = self.output(self.norm(h), targets=targets)
        elif whole and need_logits:
            logits = self.output(self.norm(h))
        return Output(logits, features, h, loss, aligned)

    def embed(
        self, labels: Tensor | None, tokens: Tensor | None, start: int = 0, placement: Placement | None = None
    ) -> tuple[Tensor, Tensor]:
        """The input of the first block, (B, S, D), before dropout, and RoPE's rows of all blocks. Arguments of ``forward``."""
        cfg = self.cfg
        parts = [] if labels is None else [self.cls_embedding(labels)]
        if tokens is not None and tokens.shape[1]:
            parts.append(self.tok_embeddings(tokens))
        h = torch.cat(parts, 1) if len(parts) > 1 else parts[0]  # (B, S, D)
        kind = torch.float64 if h.dtype == torch.float64 else torch.float32
        if cfg.target_position == "none":
            assert placement is None, "a raster network has no placement"
            return h, rope_table(cfg.grid, cfg.head_dim, cfg.rope_base, h.device, kind)[start : start + h.shape[1]]
        placement = placement or Placement.raster(start, h.shape[1], h.device)
        return h + self.target_embeddings(placement.target), placed_rope(cfg, placement, h.device, kind)
