"""A head and an embedding that factorise the codebook, without a table of V rows.

A code is the number with the digits ("sub-codes") c_1 .. c_n in the bases ``head_factors`` V_1 .. V_n, the first digit the
most significant; V is the product of the bases. With two, code = a * V_2 + b and p(code | h) = p(a | h) p(b | h, a): sub-codes
are predicted one after the other within a position, as the two sub-tokens of Open-MAGVIT2 (arXiv 2409.04410), here by one
SwiGLU layer per further sub-code instead of a transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megastar.config.schema import ModelConfig
from megastar.model.fused import swiglu
from megastar.model.layers import Embedding, Head, Linear, RMSNorm


def sub_codes(codes: Tensor, factors: Sequence[int]) -> list[Tensor]:
    """codes (...) int64 -> one tensor (...) of digits per factor, the most significant first."""
    digits = []
    for size in reversed(factors):
        digits.append(codes % size)
        codes = codes // size
    return digits[::-1]


class SubCodeEmbedding(nn.Module):
    """codes (...) -> the sum of the embeddings of their sub-codes (..., D), with the variance of one embedding."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.factors = tuple(cfg.head_factors)
        std = cfg.initializer_range / len(self.factors) ** 0.5
        self.tables = nn.ModuleList(Embedding(size, cfg.dim, std) for size in self.factors)

    def forward(self, codes: Tensor) -> Tensor:
        parts = [table(c) for table, c in zip(self.tables, sub_codes(codes, self.factors), strict=True)]
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return out


class SubCodeMixer(nn.Module):
    """The state after a sub-code is known: (..., D), sub-codes (...) -> (..., D)."""

    def __init__(self, cfg: ModelConfig, size: int):
        super().__init__()
        self.code = Embedding(size, cfg.dim, cfg.initializer_range)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.w1 = Linear(cfg.dim, cfg.ffn_dim, cfg.initializer_range)
        self.w3 = Linear(cfg.dim, cfg.ffn_dim, cfg.initializer_range)
        self.w2 = Linear(cfg.ffn_dim, cfg.dim, cfg.initializer_range)
        self.out_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, state: Tensor, code: Tensor) -> Tensor:
        h = state + self.code(code)
        x = self.norm(h)
        return self.out_norm(h + self.w2(swiglu(self.w1(x), self.w3(x))))


class FactorisedHead(nn.Module):
    """The output layer: x (..., D) -> log-probabilities of all codes (..., V), or with targets (...) their mean cross-entropy.

    ``heads[i]`` predicts sub-code i from state i: state 0 is x, ``mixers[i]`` makes state i + 1 from state i and sub-code i.
    The loss is the sum of the heads' losses, with the true sub-codes as inputs; a table of V columns is never made for it.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.factors = tuple(cfg.head_factors)
        self.heads = nn.ModuleList(Head(cfg.dim, size, std=0.0) for size in self.factors)
        self.mixers = nn.ModuleList(SubCodeMixer(cfg, size) for size in self.factors[:-1])

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.log_probabilities(x)
        codes, state = sub_codes(targets, self.factors), x
        loss: Tensor = self.heads[0](state, targets=codes[0])
        for i in range(1, len(self.factors)):
            state = self.mixers[i - 1](state, codes[i - 1])
            loss = loss + self.heads[i](state, targets=codes[i])
        return loss

    def log_probabilities(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), by computing every combination of sub-codes: for tests and small V."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        state, total = (
            x[..., None, :],
            x.new_zeros(*x.shape[:-1], 1, dtype=wide),
        )  # (..., codes so far, D), (..., codes so far)
        for i, size in enumerate(self.factors):
            total = total[..., None] + self.heads[i](state).log_softmax(-1, dtype=wide)  # (..., codes so far, V_i)
            total = total.flatten(-2)
            if i + 1 < len(self.factors):
                codes = torch.arange(size, device=x.device)
                shape = (*state.shape[:-1], size, state.shape[-1])
                state = self.mixers[i](state[..., None, :].expand(shape), codes.expand(shape[:-1])).flatten(-3, -2)
        return total
