"""Scores of reconstructions: PSNR, SSIM, and how the codebook is used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.tokenizer.losses import psnr
from megastar.tokenizer.quantizers.base import code_statistics
from megastar.tokenizer.vq import VQModel, to_images

WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
BATCH = 128  # images that are reconstructed at once


def ssim(real: Tensor, fake: Tensor) -> Tensor:
    """Structural similarity of each image, mean over channels and pixels: (B, 3, H, W) in [-1, 1] twice -> (B,) in fp32.

    Gaussian window of 11 pixels (the largest odd number that fits a smaller image) and standard deviation 1.5, K1 = 0.01,
    K2 = 0.03, without padding. Source: Wang et al., Image quality assessment (2004).
    """
    side = min(WINDOW, *real.shape[-2:])
    side -= 1 - side % 2
    x, y = (t.double().add(1).div(2) for t in (real, fake))  # fp32 would lose digits of the variances
    at = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    window = torch.exp(-at.square() / (2 * SIGMA**2))
    window = window / window.sum()

    def smooth(t: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 3, H - side + 1, W - side + 1)
        kernel = window.expand(t.shape[1], 1, 1, side)
        h = F.conv2d(t, kernel, groups=t.shape[1])
        return F.conv2d(h, kernel.transpose(2, 3), groups=t.shape[1])

    a, b = smooth(x), smooth(y)
    c, d, e = smooth(x * x) - a * a, smooth(y * y) - b * b, smooth(x * y) - a * b
    k, m = 0.01**2, 0.03**2
    found = (2 * a * b + k) * (2 * e + m) / ((a * a + b * b + k) * (c + d + m))
    return found.mean((1, 2, 3)).float()


@torch.no_grad()
def score(model: VQModel, pixels: Tensor, device: torch.device | str = "cpu", batch: int = BATCH) -> dict[str, float]:
    """Reconstruct uint8 images (N, H, W, 3) in fp32.

    Returns ``psnr`` (dB, mean over images), ``psnr_of_mean`` (dB, of the mean squared error over all), ``codes_used``
    (share of the codebook used by these images) and ``perplexity`` (of their codes; quantizers/base.py).
    """
    ratios, uses = [], torch.zeros(model.config.codebook_size, dtype=torch.long)
    model.eval()
    for part in pixels.split(batch):
        images = to_images(part, device)
        codes = model.encode(images)
        uses += torch.bincount(codes.flatten().cpu(), minlength=len(uses))
        ratios.append(psnr(images, model.decode_codes(codes)).double().cpu())
    return summary_of(torch.cat(ratios), uses)


def summary_of(ratios: Tensor, uses: Tensor) -> dict[str, float]:
    """The mean PSNR (dB) of images with ``ratios``, the PSNR of their mean squared error, and ``code_statistics``."""
    return {
        "psnr": ratios.mean().item(),
        "psnr_of_mean": -10 * math.log10((10 ** (-ratios / 10)).mean().item()),
        **code_statistics(uses),
    }
