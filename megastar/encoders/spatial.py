"""Frozen encoders of pictures into patch features, for representation alignment: efflite0, dinov2, dinov3, or a user's function.

The input size of efflite0, dinov2 and dinov3 is chosen so that their patches are the patches of the tokens: no feature is
interpolated. A user's function may have a finer grid, a multiple of the tokens' grid, if averaging was asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.encoders.efficientnet import EfficientNetLite0, weights_file
from megastar.encoders.vit import FrozenVit
from megastar.errors import UserError
from megastar.utils.device import exact_convolutions
from megastar.utils.files import sha256
from megastar.utils.printable import one_line
from megastar.utils.weights.weight_parts import weights_sha256

logger = logging.getLogger(__name__)

NAMES = "efflite0, dinov2 or dinov3 with a weights file, or module:function"
DINO = {
    "dinov2": "dinov2_vitb14_pretrain.pth",
    "dinov3": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
}  # an example of each
BLOCK, STRIDE = (
    10,
    16,
)  # of EfficientNet-Lite0: the last block whose outputs are 16 pixels apart, counted from 0; width 112


class SpatialEncoder(Protocol):
    """Called with uint8 (B, H, W, 3) and the side g of the token grid: features (B, P, C) fp32, P patches in raster order."""

    name: str
    weights_sha256: str  # of the weights file, or of a function's source
    layer: str

    def __call__(self, pixels: Tensor, grid: int) -> Tensor: ...


def open_encoder(name: str, weights: str | Path | None = None, device: torch.device | str = "cpu") -> SpatialEncoder:
    """The encoder ``name`` with its weights file. Raises ``UserError`` for an unknown one and for unusable weights."""
    if name == "efflite0":
        if weights is not None:
            raise UserError(f"the weights of efflite0 are those of a package: leave out the weights file {weights}")
        return EffLite0Patches(device)
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"the encoder's weights {weights} do not exist: name the file")
    if name in DINO:
        if weights is None:
            raise UserError(f"{name} needs a weights file, as {DINO[name]}: name it (--feature-weights)")
        return DinoPatches(name, weights, device)
    if all(name.partition(":")):
        return CustomPatches(name, weights, device)
    raise UserError(f"unknown encoder {name!r}: choose {NAMES}")


class EffLite0Patches:
    """EfficientNet-Lite0 (ImageNet-1k weights from a package), the output of block 10: width 112, one patch per 16 pixels.

    Images are resized to 16 g pixels: 128 for the 8 x 8 tokens of 64-pixel images, 256 for 16 x 16.
    """

    name = "efflite0"
    layer = f"block {BLOCK}, {STRIDE} px a patch"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.net = EfficientNetLite0(BLOCK).requires_grad_(False).to(self.device)
        self.weights_sha256 = sha256(weights_file())

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: int) -> Tensor:
        # On a CPU few images at a time: the activations of the first blocks stay in its caches (1.7 times the images/s).
        batches = pixels.split(8 if self.device.type == "cpu" else len(pixels))
        return torch.cat([self._features(batch, grid) for batch in batches])

    def _features(self, pixels: Tensor, grid: int) -> Tensor:
        images = _resized(pixels.to(self.device), STRIDE * grid).div_(127.5).sub_(1)
        with exact_convolutions():
            return self.net.taps(images, [BLOCK])[0].flatten(2).transpose(1, 2)  # (B, C, g, g) -> (B, P, C)


class DinoPatches:
    """DINOv2 or DINOv3 of a weights file, its patch tokens after the last norm; images are resized to one patch a token."""

    layer = "patch tokens after the last norm"

    def __init__(self, name: str, weights: str | Path, device: torch.device | str = "cpu"):
        from megastar.encoders import dinov2, dinov3

        self.name, self.device = name, torch.device(device)
        net: FrozenVit = (dinov2 if name == "dinov2" else dinov3).load(weights)
        self.net = net.to(self.device)
        self.weights_sha256 = weights_sha256(weights)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: int) -> Tensor:
        images = _resized(pixels.to(self.device), self.net.patch * grid).div_(255)
        with exact_convolutions():
            patches: Tensor = self.net(images)[1]
            return patches.float()


def call_users(name: str, function: Callable[..., Tensor], pixels: Tensor, *words: str) -> Tensor:
    """A user's function of images (B, H, W, 3). Raises ``UserError`` for an exception in it; -v logs its traceback."""
    try:
        return function(pixels, *words)
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError, OSError):  # of the machine: the job is requeued
        raise
    except Exception as error:
        logger.debug("%s failed", name, exc_info=True)
        B, H, W, _ = pixels.shape
        reason = one_line(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        raise UserError(
            f"{name} failed on {B} images of {H} x {W} pixels ({reason}): it must accept uint8 images (B, H, W, 3); -v logs the traceback"
        ) from error


class CustomPatches:
    """A user's function: uint8 (B, H, W, 3) on the device, and the path of the weights where a file is named -> features
    (B, P, C), P = h * h patches in raster order. It is called by several threads at once on a CPU."""

    layer = "output"

    def __init__(self, path: str, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        self.name, self.device, self.weights = path, torch.device(device), weights
        module, _, function = path.partition(":")
        sys.path.insert(0, "")  # the working directory, as for `python -m`
        try:
            self.function: Callable[..., Tensor] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"encoder {path}: {error}; name an importable module:function") from error
        finally:
            sys.path.remove("")
        source = weights or getattr(sys.modules[module], "__file__", None)
        self.weights_sha256 = sha256(Path(source)) if source else hashlib.sha256(path.encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: int) -> Tensor:
        pixels = pixels.to(self.device)
        words = () if self.weights is None else (str(self.weights),)
        out = call_users(f"encoder {self.name}", self.function, pixels, *words)
        if not isinstance(out, Tensor) or out.ndim != 3 or len(out) != len(pixels) or 0 in out.shape:
            actual = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"encoder {self.name} returned {actual} for {len(pixels)} images: return a tensor (B, P, C)"
            )
        return out.float()


def pooled(features: Tensor, grid: int, pool: int) -> Tensor:
    """Patches (B, (pool * g)^2, C) averaged in squares of ``pool`` x ``pool``: (B, g^2, C)."""
    if pool == 1:
        return features
    B, _, C = features.shape
    squares = features.view(B, grid, pool, grid, pool, C)
    return squares.mean((2, 4)).reshape(B, grid * grid, C)


def pool_of(patches: int, grid: int, image_size: int, encoder: str, average: bool) -> int:
    """How many patches in each direction are one token's. Raises ``UserError`` for grids that do not match.

    An encoder with k x k patches a token is used if ``average``: the mean of a square is exact, other grids would have
    to be interpolated.
    """
    side = math.isqrt(patches)
    where = f"encoder {encoder} has {patches} patches for images of {image_size} pixels, the tokens a grid of {grid} x {grid}"
    if side * side != patches or side % grid:
        raise UserError(f"{where}: use an encoder with that grid, or with a multiple of it")
    if side != grid and not average:
        times = side // grid
        raise UserError(
            f"{where}: --feature-pool averages its {side} x {side} patches in squares of {times} x {times}, or use an encoder "
            "with the tokens' grid"
        )
    return side // grid


def _resized(pixels: Tensor, side: int) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, side, side) in 0..255, bicubic with Pillow's filter, without rounding."""
    images = pixels.permute(0, 3, 1, 2).float()
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    return images
