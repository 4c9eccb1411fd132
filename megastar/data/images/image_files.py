"""The only place where image files are opened: the documented formats, of a bounded size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

# Pillow would also try formats that start other programs (PostScript) or have rarely used decoders.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_PIXELS = 40_000_000  # checked in the header, before decoding
_TILE_SIDES = (322, 323)  # TIFF tags; a tile may be larger than its image

# Pillow warns from 89 megapixels; the limit here is 40. A filter set around each call is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used; the caller skips and counts it."""


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Open an image file of ``FORMATS``, by its content, and read its header.

    Raises ``ImageError`` for other formats and for more than ``MAX_PIXELS``; for a broken file ``OSError``,
    ``ValueError``, ``SyntaxError`` and others of Pillow, as decoding does.
    """
    try:
        image: Image.Image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:  # its text holds a memory address, which varies
        raise ImageError(f"unreadable (unknown image format, not {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice 89 megapixels
        raise ImageError(f"exceeds {MAX_PIXELS // 1_000_000} megapixels ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} exceeds {MAX_PIXELS // 1_000_000} megapixels")
    tags = getattr(image, "tag_v2", {})
    tile_width, tile_height = (int(tags.get(side, 0)) for side in _TILE_SIDES)
    if tile_width * tile_height > MAX_PIXELS:
        raise ImageError(f"tiles of {tile_width} x {tile_height} exceed {MAX_PIXELS // 1_000_000} megapixels")
    return image
