"""Vector quantization: the nearest code of a learned codebook (VQ-VAE, arXiv 1711.00937; on the sphere: ViT-VQGAN, arXiv 2110.04627)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.tokenizer.quantizers.base import Quantized, Quantizer, rows_at_once


class VectorQuantizer(Quantizer):
    """Nearest code by Euclidean distance, on the unit sphere when ``l2_norm`` (LlamaGen's default).

    ``codebook_loss`` moves codes toward encoder outputs, ``commitment_loss`` the reverse.
    """

    def __init__(self, codebook_size: int, embed_dim: int, l2_norm: bool = True):
        super().__init__()
        self.codebook_size, self.embed_dim, self.l2_norm = codebook_size, embed_dim, l2_norm
        self.embedding = nn.Embedding(codebook_size, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        if l2_norm:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def codebook(self) -> Tensor:  # (V, E)
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def forward(self, z: Tensor, entropy_temperature: float | None = None) -> Quantized:
        z = z.float().permute(0, 2, 3, 1)  # (B, h, w, E)
        if self.l2_norm:
            z = F.normalize(z, dim=-1)
        book = self.codebook()
        codes = self._nearest(z, book)
        quant = F.embedding(codes, book)
        codebook_loss = (quant - z.detach()).square().mean()
        commitment_loss = (quant.detach() - z).square().mean()
        quant = z + (quant - z).detach()
        return Quantized(quant.permute(0, 3, 1, 2), codebook_loss, commitment_loss, codes, z.new_zeros(()))

    @torch.no_grad()
    def _nearest(self, z: Tensor, book: Tensor) -> Tensor:
        """z (B, h, w, E) fp32 -> codes (B, h, w), found in fp32 also under autocast: bf16 would confuse near codes."""
        squares = book.square().sum(1)
        # |z|^2 is the same for every code, so it cannot change the minimum.
        parts = z.reshape(-1, self.embed_dim).split(rows_at_once(self.codebook_size))  # (rows, E)
        with torch.autocast(z.device.type, enabled=False):
            codes = [(squares - 2 * part @ book.t()).argmin(1) for part in parts]
        return torch.cat(codes).view(z.shape[:-1])

    def encode(self, z: Tensor) -> Tensor:
        return self._nearest(self.unquantized(z).permute(0, 2, 3, 1), self.codebook())

    def decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook())

    def unquantized(self, z: Tensor) -> Tensor:
        return F.normalize(z.float(), dim=1) if self.l2_norm else z.float()
