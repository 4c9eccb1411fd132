"""The image tokenizer: LlamaGen's convolutional VQ auto-encoder with configurable width, down-sampling and quantizer.

Module and weight names are those of LlamaGen (tokenizer/tokenizer_image/vq_model.py), so its released VQ-16 and VQ-8
files can be loaded. Legend: B batch, C channels, h w the token grid, T = h * w, E code dimension, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.config.schema import TokenizerConfig
from megastar.tokenizer.quantizers.make import make_quantizer


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the lowest level."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, T, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).reshape(B, C, h, w))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """One resolution: residual blocks, attention after each at the lowest level, then a change of resolution."""

    res: nn.ModuleList
    attn: nn.ModuleList

    def __init__(self, channels: list[int], groups: int, dropout: float, attention: bool):
        super().__init__()
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.res = nn.ModuleList(ResnetBlock(a, b, groups, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(c, groups) for c in (channels[1:] if attention else []))

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h = getattr(self, name)(h)
        return h


def _middle(channels: int, groups: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, groups, dropout),
            AttnBlock(channels, groups),
            ResnetBlock(channels, channels, groups, dropout),
        ]
    )


class Encoder(nn.Module):
    def __init__(self, c: TokenizerConfig):
        super().__init__()
        width = c.channels
        mult: Sequence[int] = c.channel_multipliers
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        current = width
        for i, m in enumerate(mult):
            last = i == len(mult) - 1
            level = _Level([current] + [width * m] * c.res_blocks, c.norm_groups, c.dropout, last)
            current = width * m
            if not last:
                level.downsample = Downsample(current)
            self.conv_blocks.append(level)
        self.mid = _middle(current, c.norm_groups, c.dropout)
        self.norm_out = _norm(current, c.norm_groups)
        self.conv_out = nn.Conv2d(current, c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, z_channels, h, w)
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, c: TokenizerConfig):
        super().__init__()
        width = c.channels
        mult = list(c.channel_multipliers)
        current = width * mult[-1]
        self.conv_in = nn.Conv2d(c.z_channels, current, 3, padding=1)
        self.mid = _middle(current, c.norm_groups, c.dropout)
        self.conv_blocks = nn.ModuleList()
        for i in reversed(range(len(mult))):
            channels = [current] + [width * mult[i]] * (c.res_blocks + 1)
            level = _Level(channels, c.norm_groups, c.dropout, i == len(mult) - 1)
            current = width * mult[i]
            if i:
                level.upsample = Upsample(current)
            self.conv_blocks.append(level)
        self.norm_out = _norm(current, c.norm_groups)
        self.conv_out = nn.Conv2d(current, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B, z_channels, h, w) -> (B, 3, H, W)
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQModel(nn.Module):
    """Images in [-1, 1] to a grid of codes and back."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = make_quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, E, h, w) before quantization."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, T) int64, row by row."""
        return self.quantize.encode(self.latents(images)).flatten(1)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents (B, E, h, w) -> images (B, 3, H, W), nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, T) -> images (B, 3, H, W) clamped to [-1, 1]; T must be a square number."""
        side = round(codes.shape[1] ** 0.5)
        assert side * side == codes.shape[1], f"T={codes.shape[1]} is not a square grid"
        latents = self.quantize.decode(codes).view(len(codes), side, side, -1)
        return self.decode(latents.permute(0, 3, 1, 2)).clamp(-1, 1)


def to_images(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return pixels.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
