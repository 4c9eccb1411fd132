"""The named sets of crops that turn an image into views, LlamaGen's among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from megastar.data.images.dataset import center_crop, ten_crop
from megastar.errors import UserError

Crops = Callable[[Image.Image, int], np.ndarray]


def parse_crops(text: str) -> tuple[Crops, int]:
    """``ten:SCALE``, ``center-flip``, ``center``, or several joined by ``+`` -> (image, size) -> (views, size, size,
    3) uint8, and views.

    ``ten:1.1+ten:1.05``, LlamaGen's two sets, gives 20 views: ten of the first, then ten of the second.
    """
    sets = [_one(part, text) for part in text.split("+")]

    def make(image: Image.Image, size: int) -> np.ndarray:
        return np.concatenate([crop(image, size) for crop, _ in sets])

    return make, sum(views for _, views in sets)


def _one(part: str, text: str) -> tuple[Crops, int]:
    name, _, scale = part.partition(":")
    try:
        if name == "ten" and 1.0 <= (factor := float(scale or 1.1)) <= 4.0:
            return partial(ten_crop, scale=factor), 10
    except ValueError:
        pass
    if part == "center-flip":
        return _center_flip, 2
    if part == "center":
        return _center, 1
    raise UserError(
        f"crops {text!r} is unknown: use ten:1.1 (scale 1 to 4), center-flip or center, or several joined by +"
    )


def _center(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(center_crop(image, size))[None]


def _center_flip(image: Image.Image, size: int) -> np.ndarray:
    """LlamaGen's extraction without ten-crop: the centre crop and its mirror image."""
    pixels = np.asarray(center_crop(image, size))
    return np.stack([pixels, pixels[:, ::-1]])
