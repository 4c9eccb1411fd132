"""Pictures as users keep them: a folder per class, or WebDataset tars, read by position.

Two layouts, the same for folders and tars:

* ``.../<class>/<name>.png``: the parent folder names the class (ImageNet's layout);
* ``<key>.png`` beside ``<key>.cls``: WebDataset's layout, the class is the integer in ``.cls``.

A ``subset`` keeps the pictures below one top folder (``train``, ``val``); classes are numbered over the whole source,
so that subsets agree. The list is sorted by key, so picture i is the same on every machine.
"""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from megastar.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 40_000_000  # from the header, before anything is decoded
MAX_ASPECT = 100  # a longer strip, enlarged to the crop's short side, would fill the memory
CLASS_LIMIT = 1_000_000

# Pillow warns at 89 megapixels, which are refused here at 40. A filter set around each call is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Entry = tuple[str, Path, int, int, "int | None"]  # key, file, offset, size, label of .cls


@dataclass(frozen=True)
class Picture:
    """Where one picture lies. ``offset`` is -1 for a plain file."""

    key: str
    label: int
    file: Path
    offset: int = -1
    size: int = -1


class PictureError(ValueError):
    """One picture that cannot be used; the caller skips and counts it."""


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component."""
    path = PurePosixPath(name)
    stem, dot, extension = path.name.partition(".")
    return str(path.parent / stem), (dot + extension).lower()


class PictureSet:
    """All pictures of a folder or of tars, with their class names.

    Raises ``UserError`` when the source is missing, holds no picture, or mixes labelled and unlabelled ones.
    """

    def __init__(self, source: str | Path, subset: str | None = None):
        self.source, self.subset = Path(source), (subset or "").strip("/")
        tars = self._tars()
        everything = sorted(
            self._from_tars(tars) if tars else self._from_folder(), key=lambda e: (e[0], str(e[1]), e[2])
        )
        entries = [e for e in everything if e[0].startswith(self.subset + "/")] if self.subset else everything
        if not entries:
            where = f"{self.source}" + (f" (subset {self.subset!r})" if self.subset else "")
            raise UserError(
                f"no pictures in {where}: expected {', '.join(SUFFIXES)} files in one folder per class, or tars of them"
            )
        self.pictures, self.class_names = self._label(entries, everything)

    def _tars(self) -> list[Path]:
        if not self.source.exists():
            raise UserError(
                f"picture source {self.source} does not exist: give a folder of pictures, a .tar, or a folder of tars"
            )
        if self.source.is_file():
            if not self.source.name.endswith((".tar", ".tar.gz", ".tgz")):
                raise UserError(f"picture source {self.source} is neither a folder nor a .tar file")
            return [self.source]
        return sorted(self.source.glob("*.tar"))

    def _from_folder(self) -> Iterator[Entry]:
        for path in self.source.rglob("*"):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                cls = path.with_name(_split(path.name)[0] + ".cls")
                label = _parse_label(cls.read_bytes(), cls) if cls.is_file() else None
                yield _key(path.relative_to(self.source).as_posix()), path, -1, -1, label

    def _from_tars(self, tars: Sequence[Path]) -> Iterator[Entry]:
        for tar in tars:
            images: list[tuple[str, int, int]] = []
            labels: dict[str, int] = {}
            try:
                with tarfile.open(tar) as archive:
                    for member in archive:
                        extension = _split(member.name)[1]
                        if member.isfile() and extension.endswith(SUFFIXES):
                            images.append((member.name, member.offset_data, member.size))
                        elif member.isfile() and extension == ".cls":
                            data = archive.extractfile(member)
                            assert data is not None
                            labels[_split(member.name)[0]] = _parse_label(data.read(64), f"{tar}:{member.name}")
                    end = archive.offset
            except (tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{tar} is not a readable tar ({error}): make or copy it again") from error
            if tar.name.endswith("gz"):
                raise UserError(f"{tar} is compressed, so pictures cannot be read by position: gunzip it first")
            with tar.open("rb") as f:  # tarfile stops in silence where a header is broken or the file was cut
                f.seek(end)
                if f.read(512) != bytes(512):
                    raise UserError(
                        f"{tar} is broken or cut at byte {end}, after {len(images)} pictures: copy it again"
                    )
            for name, offset, size in images:
                yield _key(name), tar, offset, size, labels.get(_split(name)[0])

    def _label(self, entries: list[Entry], everything: list[Entry]) -> tuple[list[Picture], list[str]]:
        """Classes of the chosen ``entries``, numbered over ``everything`` in the source."""
        unlabelled = [e for e in entries if e[4] is None]
        if 0 < len(unlabelled) < len(entries):
            raise UserError(
                f"{self.source}: {len(unlabelled)} of {len(entries)} pictures have no .cls, the first is {unlabelled[0][0]!r}: label all or none"
            )
        if not unlabelled:
            names = [str(i) for i in range(1 + max(e[4] for e in everything if e[4] is not None))]
            return [Picture(k, label, f, o, s) for k, f, o, s, label in entries if label is not None], names
        folders = [str(PurePosixPath(e[0]).parent) for e in entries]
        loose = [e[0] for e, folder in zip(entries, folders, strict=True) if folder == (self.subset or ".")]
        if 0 < len(loose) < len(entries):
            raise UserError(
                f"{self.source}: picture {loose[0]!r} lies outside any class folder, others lie in one: move it or remove it"
            )
        # With a subset, a picture right below some top folder (an unlabelled test set) names no class.
        parents = {PurePosixPath(e[0]).parent for e in everything}
        deep = {p.name for p in parents if not self.subset or len(p.parts) > 1}
        names = sorted(deep | {PurePosixPath(folder).name for folder in folders})
        index = {name: i for i, name in enumerate(names)}
        classes = [index[PurePosixPath(folder).name] for folder in folders]
        return [Picture(e[0], c, e[1], e[2], e[3]) for e, c in zip(entries, classes, strict=True)], names

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, i: int) -> Image.Image:
        """Picture i as RGB on white. Raises ``PictureError`` for a broken or gigantic one, never decoding the latter."""
        p = self.pictures[i]
        try:
            with p.file.open("rb") as f:
                f.seek(max(0, p.offset))
                data = f.read(p.size)
        except OSError as error:
            raise PictureError(f"{p.key}: {error}") from error
        return decode(data, p.key)


def _key(name: str) -> str:
    """The whole name less the picture's suffix: names with dots stay apart."""
    return str(PurePosixPath(name).with_suffix(""))


def _parse_label(data: bytes, where: object) -> int:
    try:
        label = int(data)
    except ValueError:
        label = -1
    if not 0 <= label < CLASS_LIMIT:
        raise UserError(f"{where} holds {data[:20]!r}: a class is an integer from 0 to {CLASS_LIMIT - 1}")
    return label


def decode(data: bytes, name: str) -> Image.Image:
    """Bytes of a picture -> RGB, transparency laid on white. Raises ``PictureError``."""
    try:
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:  # Pillow's own limit, of twice 89 megapixels
            raise PictureError(f"{name}: over {MAX_PIXELS // 1_000_000} megapixels ({error})") from error
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"{name}: {width} x {height} is over {MAX_PIXELS // 1_000_000} megapixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise PictureError(f"{name}: {width} x {height} is over {MAX_ASPECT} times as long as wide")
        if image.mode.startswith("I;16"):  # convert("RGB") would clip, not scale
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            white.alpha_composite(image)
            image = white
        return image.convert("RGB")
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # its text names a memory address, another one each time
        raise PictureError(f"{name}: unreadable (no known picture format)") from error
    except Exception as error:  # Pillow raises a dozen types for broken files; none may end the run
        raise PictureError(f"{name}: unreadable ({type(error).__name__}: {error})") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while twice as large, bicubic to the short side, cut the middle.

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
    then the same five of the mirrored picture.
    """
    large = int(size * scale)
    pixels = np.asarray(center_crop(image, large))
    d = large - size
    middle = round(d / 2)

    def five(x: np.ndarray) -> list[np.ndarray]:
        corners = [(0, 0), (0, d), (d, 0), (d, d), (middle, middle)]
        return [x[top : top + size, left : left + size] for top, left in corners]

    return np.stack(five(pixels) + five(pixels[:, ::-1]))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = 1.25) -> np.ndarray:
    """A random crop of a random enlargement in [1, max_scale], mirrored half of the time: (size, size, 3) uint8."""
    pixels = np.asarray(center_crop(image, int(size * rng.uniform(1.0, max_scale))))
    d = pixels.shape[0] - size
    top, left = rng.integers(0, d + 1, 2)
    pixels = pixels[top : top + size, left : left + size]
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels
