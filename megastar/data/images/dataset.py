"""Random access to the images of a source (sources.py): decoding and cropping.

The class of an image is its top folder, or that in a companion or list (classes.py). A ``subset`` selects the images below
one top folder (``train``, ``val``), and the folders in it are the classes; they are numbered over the whole source, so that
subsets agree. The list is sorted by key, so image i is the same on every machine and for every kind of source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megastar.data.images import sources
from megastar.data.images.classes import DEFAULT, Choice, Classes, find_classes
from megastar.data.images.decoding import decode
from megastar.data.images.image_files import SUFFIXES, ImageError
from megastar.data.images.listing import Listing, key_of
from megastar.data.images.tars import RemoteTars, Report
from megastar.data.storage.store import is_remote
from megastar.errors import UserError
from megastar.utils.files import open_regular

MAX_BYTES = 512 << 20  # of a file: 40 megapixels of four 16-bit channels, uncompressed, are 305 MiB


@dataclass(frozen=True)
class ImageEntry:
    """Location of one image. ``offset`` is -1 for a plain file."""

    key: str
    label: int
    file: Path
    offset: int = -1
    size: int = -1


class ImageSet:
    """All images of a source (see sources.py), with their class names; ``images[i]`` is the location of image i.

    Args:
        choice: how classes are read. With None they are not needed: where they are ambiguous or missing, ``labels`` is -1,
            ``class_names`` is empty and ``class_problem`` is the reason.
        cache: a file that stores the listing; it is used while the source's sizes and times are unchanged.

    ``notes`` are sentences about what was ignored or decided. Raises ``UserError`` for a source that is missing, holds no
    image, or, unless ``choice`` is None, whose classes can be read in several ways.
    """

    def __init__(
        self,
        source: str | Path,
        subset: str | None = None,
        *,
        choice: Choice | None = DEFAULT,
        cache: Path | None = None,
        report: Report = lambda _: None,
    ):
        self.source, self.subset = source if is_remote(source) else Path(source), (subset or "").strip("/")
        self.remote = RemoteTars(str(source)) if is_remote(source) else None
        label_field = choice.field if choice else ""
        listing = Listing.load(cache) if cache else None
        current = listing is not None and sources.is_current(listing, source, self.remote, label_field)
        if listing is None or not current:
            listing = sources.list_source(source, self.remote, report, label_field)
        if self.remote is not None:
            self.remote.pin(listing.stamps)
        chosen = np.array([not self.subset or f"{f}/".startswith(f"{self.subset}/") for f in listing.folders], bool)
        rows = np.flatnonzero(chosen[listing.folder]) if len(listing) else np.empty(0, np.int64)
        self.notes = listing.findings.sentences()
        if not len(rows):
            where = f"{self.source}" + (f" (subset {self.subset!r})" if self.subset else "")
            ignored = f"; {'; '.join(self.notes)}" if self.notes else ""
            raise UserError(
                f"no images in {where}: expected {', '.join(SUFFIXES)} files in one folder per class, or tars of them{ignored}"
            )
        self.class_problem = ""
        try:
            self.classes = find_classes(listing, rows, f"{self.source}", self.subset, choice or DEFAULT)
            self.notes += self.classes.notes
        except UserError as error:
            if choice is not None:
                raise
            self.class_problem, self.classes = str(error), Classes(np.full(len(rows), -1), [], "")
        root = Path() if self.remote is not None else Path(source)
        self.root, self.listing, self.rows = root.parent if root.is_file() else root, listing, rows
        if cache and not current:
            listing.save(cache)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64, the class of each image."""
        return self.classes.labels

    @property
    def class_names(self) -> list[str]:
        """By number."""
        return self.classes.names

    def digest(self) -> str:
        """SHA-256 of the sorted keys and classes, which identifies the set of images."""
        found = hashlib.sha256()
        for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True):
            found.update(f"{key_of(self.listing.name(row))}\t{label}\n".encode())
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> ImageEntry:
        columns, row = self.listing, int(self.rows[i])
        name, file = columns.name(row), int(columns.tar[row])
        path = self.root / (os.fsdecode(name) if file < 0 else columns.files[file])
        return ImageEntry(key_of(name), int(self.labels[i]), path, int(columns.offset[row]), int(columns.size[row]))

    def __iter__(self) -> Iterator[ImageEntry]:
        return map(self.__getitem__, range(len(self)))

    def read(self, i: int) -> Image.Image:
        """Image i as RGB. Raises ``ImageError`` for an image that is broken, missing or too large (which is not
        decoded), and ``UserError`` for a failing source, where the image itself may be good."""
        p = self[i]
        if self.remote is not None:
            _check_size(p.key, p.size)
            return decode(self.remote.read(str(p.file), p.offset, p.offset + p.size), p.key)
        try:
            with open_regular(p.file) as f:
                f.seek(max(0, p.offset))
                _check_size(p.key, size := p.size if p.size >= 0 else os.fstat(f.fileno()).st_size)
                data = f.read(size)
        except (FileNotFoundError, NotADirectoryError) as error:
            if p.offset >= 0 or not p.file.parent.is_dir():  # more than one image: the disk is gone
                gone = p.file if p.offset >= 0 else p.file.parent
                raise UserError(f"{gone} no longer exists: run the same command again once it does") from error
            raise ImageError(f"{p.key}: {error.strerror}") from error
        except IsADirectoryError as error:
            raise ImageError(f"{p.key}: {error.strerror}") from error
        except PermissionError as error:  # of this user or node: the same image may be readable elsewhere
            problem = f"{p.file} cannot be read ({error.strerror})"
            raise UserError(
                f"{problem}: make it readable here, or remove it, and run the same command again"
            ) from error
        except OSError as error:
            raise UserError(f"{p.file} cannot be read ({error}): run the same command again once it can be") from error
        if len(data) < p.size:
            raise UserError(f"{p.file} ends inside {p.key}: it was truncated after it was listed, copy it again")
        return decode(data, p.key)


def _check_size(key: str, size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"{key}: its {size} bytes exceed {MAX_BYTES >> 20} MiB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with a box filter while at least twice as large, resize bicubically, crop.

    Source: LlamaGen dataset/augmentation.py, center_crop_arr.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def ten_crop(image: Image.Image, size: int, scale: float = 1.1) -> np.ndarray:
    """LlamaGen's ten crops of a centre crop to int(scale * size): (10, size, size, 3) uint8.

    Order of torchvision's TenCrop: four corners (top left, top right, bottom left, bottom right), the centre,
    then the same five of the mirrored image.
    """
    large = int(size * scale)
    pixels = np.asarray(center_crop(image, large))
    d = large - size
    middle = round(d / 2)

    def five(x: np.ndarray) -> list[np.ndarray]:
        corners = [(0, 0), (0, d), (d, 0), (d, d), (middle, middle)]
        return [x[top : top + size, left : left + size] for top, left in corners]

    return np.stack(five(pixels) + five(pixels[:, ::-1]))


class CropPlace(NamedTuple):
    """A random crop: ``large``, the side of the centre crop that it is taken from, its corner, and whether it is mirrored."""

    large: int
    top: int
    left: int
    mirrored: bool


def draw_crop(size: int, rng: np.random.Generator, max_scale: float = 1.25) -> CropPlace:
    """A random crop of ``size`` pixels of a random enlargement in [1, max_scale], mirrored half of the time. The draws
    depend on no image: a rank draws those of a whole batch and decodes its part."""
    large = int(size * rng.uniform(1.0, max_scale))
    top, left = rng.integers(0, large - size + 1, 2)
    return CropPlace(large, int(top), int(left), bool(rng.random() < 0.5))


def crop_at(image: Image.Image, size: int, place: CropPlace) -> np.ndarray:
    """The crop of ``image``: (size, size, 3) uint8."""
    pixels = np.asarray(center_crop(image, place.large))
    pixels = pixels[place.top : place.top + size, place.left : place.left + size]
    return pixels[:, ::-1] if place.mirrored else pixels


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = 1.25) -> np.ndarray:
    """``crop_at`` of ``draw_crop``: (size, size, 3) uint8."""
    return crop_at(image, size, draw_crop(size, rng, max_scale))
