"""The tokenizer's losses besides the two of the quantizer. Pure functions and two small networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.config.schema import TokenizerTrainConfig
from megastar.encoders.efficientnet import EfficientNetLite0
from megastar.tokenizer.lpips import load_lpips


class PerceptualLoss(nn.Module):
    """Distance of unit-length channel vectors in the early layers of a frozen ImageNet network (LPIPS without its learned weights).

    LlamaGen uses LPIPS on VGG (lpips.py); here the network is EfficientNet-Lite0, whose weights install from a package.
    Only the first and third of its 16 blocks are used, far from the last-layer features of the score FD-EffLite0.
    """

    def __init__(self, blocks: tuple[int, ...] = (0, 2)):
        super().__init__()
        self.net = EfficientNetLite0(last_block=max(blocks)).requires_grad_(False).eval()
        self.blocks = blocks

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """real, fake (B, 3, H, W) in [-1, 1] -> scalar."""
        with torch.no_grad():
            wanted = self.net.taps(real, self.blocks)
        loss = real.new_zeros(())
        for a, b in zip(wanted, self.net.taps(fake, self.blocks), strict=True):
            a, b = (F.normalize(t.float(), dim=1, eps=1e-6) for t in (a, b))
            loss = loss + (a - b).square().sum(1).mean()
        return loss / len(self.blocks)


def make_perceptual(c: TokenizerTrainConfig) -> nn.Module | None:
    """The perceptual loss that the configuration names: real, fake (B, 3, H, W) -> scalar. Raises ``UserError``."""
    if not c.perceptual:
        return None
    return load_lpips(c.lpips_vgg, c.lpips_linear) if c.lpips_vgg else PerceptualLoss()


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> a map of logits, one per patch (as in pix2pix and taming-transformers).

    ``batch_norm``: the network of taming-transformers and LlamaGen (discriminator_patchgan.py), with BatchNorm, no bias
    before it, and weights from N(0, 0.02^2); otherwise GroupNorm and torch's initial weights.
    """

    def __init__(self, width: int = 32, layers: int = 3, batch_norm: bool = False):
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        current = width
        for i in range(1, layers + 1):
            following = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            norm = nn.BatchNorm2d(following) if batch_norm else nn.GroupNorm(8, following)
            steps += [nn.Conv2d(current, following, 4, stride, 1, bias=not batch_norm), norm, nn.LeakyReLU(0.2)]
            current = following
        steps.append(nn.Conv2d(current, 1, 4, 1, 1))
        self.net = nn.Sequential(*steps)
        if batch_norm:
            for module in self.net:
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, 0.0, 0.02)
                elif isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def make_discriminator(c: TokenizerTrainConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The discriminator that the configuration names, and its optimizer."""
    if c.discriminator == "llamagen":
        net = PatchDiscriminator(64, batch_norm=True)
        return net, torch.optim.Adam(net.parameters(), lr=c.lr, betas=(0.9, 0.95))
    net = PatchDiscriminator()
    return net, torch.optim.AdamW(net.parameters(), lr=c.lr, betas=(0.5, 0.9))


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real and reconstructed images -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) in [-1, 1] twice -> (B,)."""
    mse = (real.float() - fake.float()).square().mean((1, 2, 3)) / 4  # to the [0, 1] range
    return -10 * torch.log10(mse.clamp_min(1e-10))
