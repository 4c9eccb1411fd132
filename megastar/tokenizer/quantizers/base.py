"""What all quantizers share: their interface, their result, and the statistics of the codes.

Legend: B batch, h w the token grid, E dimension of a code, V codes, N = B * h * w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

AT_ONCE = 1 << 26  # entries of an (N, V) table that are in memory at a time


class Quantized(NamedTuple):
    """A quantizer's result. The training loss adds ``codebook_loss``, and the other two with their weights."""

    latents: Tensor  # (B, E, h, w): the values of the codes, with a gradient to the input
    codebook_loss: Tensor  # scalar, its weight is 1
    commitment_loss: Tensor  # scalar, its weight is ``commitment``
    codes: Tensor  # (B, h, w) int64
    entropy_loss: Tensor  # scalar, its weight is ``entropy``; 0 without a temperature and where there is none


class Quantizer(nn.Module, ABC):
    """Latents (B, E, h, w) to codes 0..V - 1 and back."""

    codebook_size: int
    embed_dim: int
    # The mean over the ranks of a mean over this rank's part of the batch, with its gradient (parallel/replicas.py).
    average: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    @abstractmethod
    def forward(self, z: Tensor, entropy_temperature: float | None = None) -> Quantized:
        """z (B, E, h, w) -> ``Quantized``. ``entropy_temperature`` None omits the entropy loss."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """z (B, E, h, w) -> codes (B, h, w) int64, without a gradient."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """codes (...) int64 -> latents (..., E) fp32."""

    def unquantized(self, z: Tensor) -> Tensor:
        """z (B, E, h, w) as the decoder receives it in steps without quantization, of the same shape."""
        return z


def rows_at_once(columns: int) -> int:
    """Rows of an (N, columns) table that are in memory at a time."""
    return max(1, AT_ONCE // columns)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; its gradient is finite at probability 0."""
    return -(probabilities * probabilities.clamp_min(1e-20).log()).sum(-1)


def code_statistics(counts: Tensor) -> dict[str, float]:
    """Uses of each code (V,) -> ``codes_used``, the share of codes with a use, and ``perplexity``, exp of the entropy
    of the distribution of the codes: V if all are equally frequent, 1 if there is one."""
    shares = counts.double() / counts.sum().clamp_min(1)
    return {"codes_used": (counts > 0).double().mean().item(), "perplexity": entropy(shares).exp().item()}


def channels_last(z: Tensor) -> Tensor:
    """(B, E, h, w) -> (B, h, w, E), at least fp32."""
    z = z if z.dtype == torch.float64 else z.float()
    return z.permute(0, 2, 3, 1)
