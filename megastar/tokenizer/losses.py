"""The tokenizer's losses besides the two of the quantizer. Pure functions and two small networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.tokenizer.efficientnet import EfficientNetLite0


class PerceptualLoss(nn.Module):
    """Distance of unit-length channel vectors in the early layers of a frozen ImageNet network (LPIPS without its learned weights).

    LlamaGen uses LPIPS on VGG; here the network is EfficientNet-Lite0, whose weights install from a package.
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


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> a map of logits, one per patch (as in pix2pix and taming-transformers)."""

    def __init__(self, width: int = 32, layers: int = 3):
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        current = width
        for i in range(1, layers + 1):
            following = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            steps += [nn.Conv2d(current, following, 4, stride, 1), nn.GroupNorm(8, following), nn.LeakyReLU(0.2)]
            current = following
        steps.append(nn.Conv2d(current, 1, 4, 1, 1))
        self.net = nn.Sequential(*steps)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real and reconstructed images -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: (B, 3, H, W) in [-1, 1] twice -> (B,)."""
    mse = (real.float() - fake.float()).square().mean((1, 2, 3)) / 4  # to the [0, 1] range
    return -10 * torch.log10(mse.clamp_min(1e-10))
