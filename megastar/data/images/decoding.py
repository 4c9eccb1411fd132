"""Bytes of an image file -> 8-bit RGB."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from megastar.data.images.image_files import ImageError, open_image
from megastar.errors import UserError

MAX_ASPECT = 100  # a longer strip, resized to the crop's short side, could exhaust the memory
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_KINDS = {2: "signed integer", 3: "floating-point", 5: "complex", 6: "complex"}  # of TIFF's SampleFormat
_WIDE = {"I": "32-bit integer", "F": "floating-point"}  # modes of Pillow


def decode(data: bytes, name: str) -> Image.Image:
    """Bytes of an image file -> RGB, transparency composited on white. Raises ``ImageError``."""
    try:
        image = open_image(io.BytesIO(data))
        width, height = image.size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError(f"{width} x {height} has an aspect ratio over {MAX_ASPECT}")
        image = _eight_bits(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            white.alpha_composite(image)
            image = white
        return image.convert("RGB")
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except MemoryError as error:  # of this machine, not of the image
        raise UserError(f"{name}: no memory is left to decode it: use fewer workers, or a machine with more") from error
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise ImageError(f"{name}: unreadable ({type(error).__name__}: {error})") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits -> the upper 8 of 16 bits, which ``convert("RGB")`` would clip to white.

    Raises ``ImageError`` for samples whose black and white no header defines: signed, floating-point, 32-bit.
    """
    tags: Any = getattr(image, "tag_v2", {})
    kinds = {_KINDS[k] for k in _numbers(tags.get(_SAMPLE_FORMAT, 1)) if k in _KINDS}
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        kinds |= {_WIDE[image.mode]}
    if kinds:
        raise ImageError(
            f"has {sorted(kinds)[0]} samples, whose black and white are not defined: convert it to 8 or 16 bits"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    # (H, W) of 0 to 65535; Pillow scales a PGM of any maxval to that.
    grey = np.asarray(image).astype(np.int64)
    if image.format == "TIFF":
        bits = max(_numbers(tags.get(_BITS, 16)))
        grey = grey << 16 - bits if 8 < bits < 16 else grey
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits only
            grey = (1 << 16) - 1 - grey
    transparent = image.info.get("transparency")
    made = (grey >> 8).clip(0, 255).astype(np.uint8)
    if isinstance(transparent, int):  # a grey of 16 bits
        made = np.where(grey == transparent, np.uint8(255), made)
    return Image.fromarray(made)


def _numbers(value: Any) -> tuple[int, ...]:
    """The value of a TIFF tag, one number or several."""
    return tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),)
