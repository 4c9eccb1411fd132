"""Lookup-free quantization: one bit per channel, its sign (MAGVIT-v2, arXiv 2310.05737)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.tokenizer.quantizers.base import Quantized, Quantizer, channels_last, entropy


class LookupFreeQuantizer(Quantizer):
    """The codebook is {-1, 1}^E, so V = 2^E and there are no weights; bit i of a code is 1 where channel i is above 0.

    The entropy loss, E[H(p(. | z))] - H(E[p(. | z)]) with p(c | z) proportional to exp(2 z.c / temperature), makes each
    latent certain and all codes equally frequent. p is a product over the bits, so both terms are exact for any V here:
    the first is a sum over the bits, and E[p] is one product of two matrices of about (N, sqrt(V)) entries.
    """

    def __init__(self, codebook_size: int, embed_dim: int):
        assert codebook_size == 1 << embed_dim, (codebook_size, embed_dim)
        super().__init__()
        self.codebook_size, self.embed_dim = codebook_size, embed_dim

    def forward(self, z: Tensor, entropy_temperature: float | None = None) -> Quantized:
        z = channels_last(z)  # (B, h, w, E)
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        commitment_loss = (signs - z).square().mean()
        zero = z.new_zeros(())
        loss = zero
        if entropy_temperature is not None:
            loss = entropy_loss(z.reshape(-1, self.embed_dim), entropy_temperature, self.average)
        latents = z + (signs - z).detach()
        return Quantized(latents.permute(0, 3, 1, 2), zero, commitment_loss, self._codes(z), loss)

    def _codes(self, z: Tensor) -> Tensor:
        """z (..., E) -> (...)."""
        return ((z > 0).long() << torch.arange(self.embed_dim, device=z.device)).sum(-1)

    def encode(self, z: Tensor) -> Tensor:
        return self._codes(channels_last(z))

    def decode(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] >> torch.arange(self.embed_dim, device=codes.device)) & 1
        return (2 * bits - 1).float()


def entropy_loss(z: Tensor, temperature: float, average: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """z (N, E) -> scalar: the mean entropy of a latent's codes, less the entropy of the mean distribution (V,), in nats.

    ``average``: the mean of that distribution over the ranks.
    """
    with torch.autocast(z.device.type, enabled=False):
        # The logits of the codes c are 2 z.c / temperature: those of bit 1 and bit 0 differ by 4 z_i / temperature.
        x = z * (4 / temperature)  # (N, E)
        size = x.abs()
        each = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1).mean()  # the entropy of each bit
        half = z.shape[1] // 2
        low, high = _products(x[:, :half]), _products(x[:, half:])
        mean = low.t() @ high / len(z)  # (2^half, 2^(E - half)): the mean probability of each code
        return each - entropy(average(mean.flatten()))


def _products(x: Tensor) -> Tensor:
    """Logits of bits (N, E) -> probabilities of all their combinations (N, 2^E)."""
    out = x.new_ones(len(x), 1)
    for one in x.unbind(1):
        out = torch.cat([out * torch.sigmoid(-one)[:, None], out * torch.sigmoid(one)[:, None]], 1)
    return out
