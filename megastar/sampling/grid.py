"""A grid of images as one PNG: a block of rows per run, a row per class, both with their names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from megastar.errors import UserError
from megastar.utils.files import atomic_file
from megastar.utils.printable import one_line

GAP = 2  # pixels between images
INK, PAPER, RULE = (30, 30, 30), (255, 255, 255), (210, 210, 210)


class Block(NamedTuple):
    """Images with a common caption, for example 'this run' or 'shipped weights'."""

    caption: str
    images: np.ndarray  # (N, H, W, 3) uint8
    labels: Sequence[int]  # (N,)


def image_grid(blocks: Sequence[Block], class_names: Sequence[str], *, columns: int = 12) -> Image.Image:
    """Blocks below each other, each with one row per class of its first ``columns`` images.

    An image is shown with a side of at least 64 pixels. Classes without images are left out. Raises ``UserError`` for an empty grid or a label without a name.
    """
    rows = [_rows(block, class_names, columns) for block in blocks]
    shown = sorted({label for row in rows for label in row})
    if not shown:
        raise UserError("no images for the grid: sample at least one class")
    cell = max(64, blocks[0].images.shape[1])
    caption_size = max(15, cell // 4)
    class_names = [one_line(name) for name in class_names]
    font, bold = ImageFont.load_default(max(12, cell // 5)), ImageFont.load_default(caption_size)
    widest = max(font.getlength(class_names[label]) for label in shown)
    margin = min(int(widest) + 16, 4 * cell)  # a long name is shortened
    header = 2 * caption_size if any(b.caption for b in blocks) else GAP
    width = margin + columns * (cell + GAP)
    height = len(blocks) * (header + len(shown) * (cell + GAP)) + GAP
    canvas = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(canvas)
    top = 0
    for number, (block, row) in enumerate(zip(blocks, rows, strict=True)):
        if number:
            pen.line([(0, top + 1), (width, top + 1)], fill=RULE)
        if block.caption:
            pen.text((8, top + header // 2), _shorten(block.caption, bold, width - 16), INK, bold, anchor="lm")
        top += header
        for label in shown:
            name = _shorten(class_names[label], font, margin - 16)
            pen.text((8, top + cell // 2), name, INK, font, anchor="lm")
            for column, i in enumerate(row.get(label, [])):
                canvas.paste(_resized(block.images[i], cell), (margin + column * (cell + GAP), top))
            top += cell + GAP
    return canvas


def save_grid(image: Image.Image, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write the PNG atomically; the provenance goes into its text chunk ``megastar`` as JSON."""
    info = PngInfo()
    if provenance:
        info.add_text("megastar", json.dumps(provenance))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info, optimize=True)


def _rows(block: Block, class_names: Sequence[str], columns: int) -> dict[int, list[int]]:
    """Class -> indices of its first images."""
    if len(block.labels) != len(block.images):
        raise UserError(f"{block.caption or 'grid'}: {len(block.images)} images but {len(block.labels)} labels")
    rows: dict[int, list[int]] = {}
    for i, label in enumerate(map(int, block.labels)):
        if not 0 <= label < len(class_names):
            raise UserError(f"class {label} has no name: there are {len(class_names)} names")
        if len(rows.setdefault(label, [])) < columns:
            rows[label].append(i)
    return rows


def _resized(pixels: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(pixels)
    # Nearest neighbour for integer factors: enlarged images show their pixels unfiltered.
    filter = Image.Resampling.NEAREST if cell % image.width == 0 else Image.Resampling.LANCZOS
    return image if image.size == (cell, cell) else image.resize((cell, cell), filter)


def _shorten(text: str, font: Any, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
