"""Index backpropagation quantization: all codes get gradients, through a softmax over the codebook (IBQ, arXiv 2412.02692)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastar.tokenizer.quantizers.base import Quantized, Quantizer, channels_last, entropy, rows_at_once


class IndexBackpropagationQuantizer(Quantizer):
    """The code with the largest product with the latent; its one-hot vector has the gradient of the softmax of all products.

    With the hard one-hot vector H, the softmax S and the codebook C, the latents are (H + S - sg(S)) C. The losses are
    those of the authors' code (TencentARC/SEED-Voken): ``codebook_loss`` is |q - z|^2 + |sg(q) - z|^2, in which q has the
    gradient of the softmax, and ``commitment_loss``, whose weight is the paper's beta, is |H C - sg(z)|^2; all are means.
    The entropy loss is E[H(p)] - H(E[p]) with p the softmax of the products / temperature.

    The (N, V) tables are computed in chunks, and again in the backward pass, so one chunk is in memory at a time.
    """

    def __init__(self, codebook_size: int, embed_dim: int):
        super().__init__()
        self.codebook_size, self.embed_dim = codebook_size, embed_dim
        self.embedding = nn.Embedding(codebook_size, embed_dim)  # N(0, 1), as in the authors' code

    def codebook(self) -> Tensor:  # (V, E)
        weight = self.embedding.weight
        return weight if weight.dtype == torch.float64 else weight.float()

    def forward(self, z: Tensor, entropy_temperature: float | None = None) -> Quantized:
        z = channels_last(z)  # (B, h, w, E)
        book, flat = self.codebook(), z.reshape(-1, self.embed_dim)
        with torch.autocast(z.device.type, enabled=False):
            codes = self._largest(flat, book)
            hard = F.embedding(codes, book)  # (N, E)
            soft, entropy_loss = self._soft(flat, book, entropy_temperature)
        quant = hard + soft - soft.detach()
        codebook_loss = (quant - flat).square().mean() + (hard.detach() - flat).square().mean()
        commitment_loss = (hard - flat.detach()).square().mean()
        latents = quant.view(z.shape).permute(0, 3, 1, 2)
        return Quantized(latents, codebook_loss, commitment_loss, codes.view(z.shape[:-1]), entropy_loss)

    @torch.no_grad()
    def _largest(self, flat: Tensor, book: Tensor) -> Tensor:
        parts = flat.split(rows_at_once(self.codebook_size))
        return torch.cat([(part @ book.t()).argmax(1) for part in parts])

    def _soft(self, flat: Tensor, book: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        """(the codebook's means under the softmax (N, E), the entropy loss)."""
        if not torch.is_grad_enabled() and temperature is None:
            return torch.zeros_like(flat), flat.new_zeros(())  # they cancel
        means, sums, entropies = [], flat.new_zeros(self.codebook_size), flat.new_zeros(())
        for part in flat.split(rows_at_once(self.codebook_size)):
            mean, total, each = checkpoint(_chunk, part, book, temperature, use_reentrant=False)
            means.append(mean)
            if temperature is not None:
                sums, entropies = sums + total, entropies + each
        loss = flat.new_zeros(())
        if temperature is not None:
            loss = entropies / len(flat) - entropy(self.average(sums / len(flat)))
        return torch.cat(means), loss

    def encode(self, z: Tensor) -> Tensor:
        z = channels_last(z)
        with torch.autocast(z.device.type, enabled=False):
            return self._largest(z.reshape(-1, self.embed_dim), self.codebook()).view(z.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook())


def _chunk(part: Tensor, book: Tensor, temperature: float | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """part (n, E), book (V, E) -> softmax means (n, E), the sum of the probabilities (V,), the sum of their entropies."""
    with torch.autocast(part.device.type, enabled=False):
        logits = part @ book.t()  # (n, V)
        mean = logits.softmax(1) @ book.detach()  # the codebook's own gradients of S C and of sg(S) C cancel
        if temperature is None:
            return mean, None, None
        probabilities = (logits / temperature).softmax(1)
        return mean, probabilities.sum(0), entropy(probabilities).sum()
