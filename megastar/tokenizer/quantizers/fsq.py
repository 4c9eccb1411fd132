"""Finite scalar quantization: each channel is bounded and rounded to one of a few levels (arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megastar.tokenizer.quantizers.base import Quantized, Quantizer, channels_last

EPSILON = 1e-3  # of the paper's listing: keeps the bound off the next level


class FiniteScalarQuantizer(Quantizer):
    """``levels`` (E,): channel i takes levels[i] values, so V is their product; there are no weights and no losses.

    The bound is that of the paper's listing (appendix A.1). Codes count the first channel fastest. Latents are scaled to
    about [-1, 1], so an even number of levels has one more below 0 than above.
    """

    def __init__(self, codebook_size: int, levels: Sequence[int]):
        assert math.prod(levels) == codebook_size, (levels, codebook_size)
        super().__init__()
        self.codebook_size, self.embed_dim = codebook_size, len(levels)
        counts = torch.tensor(levels, dtype=torch.long, device="cpu")
        # Not persistent: the configuration has them.
        self.register_buffer("levels", counts, persistent=False)
        bases = torch.cat([counts.new_ones(1), counts[:-1].cumprod(0)])
        self.register_buffer("bases", bases, persistent=False)

    levels: Tensor  # (E,) int64
    bases: Tensor  # (E,) int64: what one step of each channel adds to the code

    def _bounded(self, z: Tensor) -> Tensor:
        """z (..., E) -> the values to round, from -(L // 2) to (L - 1) // 2."""
        half = (self.levels - 1).to(z.dtype) * (1 - EPSILON) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return torch.tanh(z + torch.tan(offset / half)) * half - offset

    def _scaled(self, rounded: Tensor) -> Tensor:
        return rounded / (self.levels // 2)

    def _codes(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.levels // 2) * self.bases).sum(-1)

    def forward(self, z: Tensor, entropy_temperature: float | None = None) -> Quantized:
        bounded = self._bounded(channels_last(z))  # (B, h, w, E)
        rounded = bounded.round()
        latents = self._scaled(bounded + (rounded - bounded).detach())
        zero = latents.new_zeros(())
        return Quantized(latents.permute(0, 3, 1, 2), zero, zero, self._codes(rounded), zero)

    def encode(self, z: Tensor) -> Tensor:
        return self._codes(self._bounded(channels_last(z)).round())

    def decode(self, codes: Tensor) -> Tensor:
        levels = codes[..., None] // self.bases % self.levels - self.levels // 2
        return self._scaled(levels.float())
