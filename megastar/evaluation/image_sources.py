"""Images to score, read in order and in batches: from a folder, tars, an .npz, or decoded token shards."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megastar.config.schema import DataConfig
from megastar.data.images.dataset import ImageSet, center_crop
from megastar.data.images.image_files import ImageError
from megastar.data.shards.reader import ShardSet
from megastar.data.storage.shard_info import MANIFEST
from megastar.data.storage.store import is_remote
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, tokenizer_hash
from megastar.tokenizer.vq import to_pixels
from megastar.utils.files import open_regular, sha256
from megastar.utils.json_file import shown
from megastar.utils.npz import NpzFile

logger = logging.getLogger(__name__)
NPZ_NAMES = ("arr_0", "images")
MAX_IMAGES, MAX_SIDE = 10_000_000, 4096  # of an .npz
BATCH_BYTES = 128 << 20


class ImageSource(Protocol):
    """``count`` images of ``height`` x ``width``; some files of a folder may be unreadable."""

    count: int
    height: int
    width: int
    resized: Mapping[str, int]  # after ``batches``: size of images that were cropped and resized -> their number

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3), each image once, in order."""

    def labels(self) -> np.ndarray | None:
        """Classes (N,), or None if the source has none."""

    def sha256(self) -> str:
        """Hash of what ``batches`` reads: the bytes of the files and the keys, not their dates or folder."""


def open_images(
    path: str | Path,
    *,
    subset: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    data: DataConfig | None = None,
) -> ImageSource:
    """A folder of images, an image tar (or folder of tars), an .npz with ``arr_0`` or ``images``, or token shards.

    Images of folders and tars are cropped to a centre square of ``size`` pixels (default: the first image's short side).
    An .npz and token shards, decoded by ``tokenizer`` on ``device``, must have that size. ``limit`` keeps the first images in order of
    their keys. ``data``: cache and patience of token shards on S3. Unreadable images are skipped with a warning. Raises ``UserError``,
    also for a ``subset`` or ``tokenizer`` that images of this kind do not use.
    """
    check_applicable(path, subset, tokenizer)
    if holds_shards(path):
        found: ImageSource = TokenImages(path, tokenizer, limit, device, data)
    elif Path(path).suffix == ".npz":
        found = NpzImages(Path(path), limit)
    else:
        return FolderImages(Path(path), subset, size, limit)
    if size is not None and (found.height, found.width) != (size, size):
        raise UserError(f"{path}: images of {found.width} x {found.height} pixels, but {size} x {size} are required")
    return found


def holds_shards(path: str | Path) -> bool:
    return is_remote(path) or (Path(path) / MANIFEST).is_file()


def check_applicable(path: str | Path, subset: str | None, tokenizer: str | Path | None) -> None:
    """Raise ``UserError`` for a choice that the images at ``path`` do not have, and that would be ignored."""
    shards = holds_shards(path)
    if subset and (shards or Path(path).suffix == ".npz"):
        kind = "token shards have" if shards else "an .npz has"
        raise UserError(
            f"{path}: {kind} no top-level folders, so the subset {shown(subset)} cannot be chosen: leave the subset out, or name a "
            "folder or tar of images"
        )
    if tokenizer is not None and not shards:
        raise UserError(
            f"{path} holds no token shards, so the tokenizer {tokenizer} would decode nothing: leave --real-tokenizer out, or "
            "name token shards"
        )


def load_images(path: str | Path, **options: Any) -> np.ndarray:
    """All images of ``open_images`` at once: uint8 (N, H, W, 3)."""
    return np.concatenate(list(open_images(path, **options).batches(256)))


def source_hash(path: str | Path, *, subset: str | None = None) -> str:
    """SHA-256 of what ``open_images`` reads from a folder, tars or an .npz."""
    if Path(path).suffix == ".npz":
        npz_names(Path(path))  # raises for a file that is missing or no .npz
        return sha256(Path(path))  # also of one with statistics only
    return open_images(path, subset=subset, size=1).sha256()


class FolderImages:
    """Files below a folder, or members of tars; decoded by threads, one batch ahead."""

    def __init__(self, path: Path, subset: str | None, size: int | None, limit: int | None):
        self.path, self.subset = path, subset
        self.set = ImageSet(path, subset, choice=None)  # scores need no classes
        for note in self.set.notes:
            logger.info("%s: %s", path, note)
        self.given, self.others = size, list[str]()  # sizes of images that differ from the one scored
        self.resized: Mapping[str, int] = {}
        self.count = min(len(self.set), limit or len(self.set))
        self.height = self.width = size or self._first_side()

    def _first_side(self) -> int:
        for i in range(len(self.set)):
            try:
                return min(self.set.read(i).size)
            except ImageError:
                continue
        raise UserError(f"{self.path}: none of its {len(self.set)} images can be read; check the files' formats")

    def _read(self, i: int) -> np.ndarray | str:
        try:
            image = self.set.read(i)
            if image.size != (self.width, self.height):
                self.others.append(f"{image.width} x {image.height}")
            return np.asarray(center_crop(image, self.height))
        except ImageError as error:
            return str(error)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        bad: list[str] = []
        self.others.clear()
        with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
            pending = [pool.submit(self._read, i) for i in range(min(batch, self.count))]
            for first in range(0, self.count, batch):
                ahead = range(first + batch, min(first + 2 * batch, self.count))
                current, pending = pending, [pool.submit(self._read, i) for i in ahead]
                results = [f.result() for f in current]
                bad += [x for x in results if isinstance(x, str)]
                if good := [x for x in results if isinstance(x, np.ndarray)]:
                    yield np.stack(good)
        if len(bad) == self.count:
            raise UserError(f"{self.path}: none of {self.count} images can be read; the first: {bad[0]}")
        if bad:
            logger.warning("%s: skipped %d of %d images: %s", self.path, len(bad), self.count, "; ".join(bad[:3]))
        self.resized = Counter(self.others)
        if self.resized:
            chosen = ", the first one's" if self.given is None else ""
            logger.log(
                logging.WARNING if self.given is None or len(self.resized) > 1 else logging.INFO,
                "%s: %d of %d images are not of the %d x %d pixels that are scored%s, and were cropped and resized (%s)",
                self.path, len(self.others), self.count, self.width, self.height, chosen, sizes_of(self.resized),
            )  # fmt: skip

    def labels(self) -> np.ndarray | None:
        return None if self.set.class_problem else self.set.labels[: self.count]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        if self.set[0].offset < 0:
            for p in self.set:
                digest.update(p.key.encode() + b"\0")
                _add_file(digest, p.file)
            return digest.hexdigest()
        digest.update((self.subset or "").strip("/").encode() + b"\0")
        for tar in sorted({p.file for p in self.set}):
            _add_file(digest, tar)
        return digest.hexdigest()


class NpzImages:
    """ADM's layout, read from the archive in batches: 50,000 images of 256 x 256 are 9.8 GB, never in memory at once."""

    resized: Mapping[str, int] = {}  # all images of an array have one size

    def __init__(self, path: Path, limit: int | None = None):
        self.path, self.file = path, NpzFile(path)
        names = npz_names(path)
        name = next((n for n in NPZ_NAMES if n in names), None)
        if name is None:
            raise UserError(f"{path} contains {shown(', '.join(names)) or 'nothing'}: expected arr_0 or images")
        self.name, header = name, self.file.header(name)
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise UserError(
                f"{path}: {name} is {header.dtype} {shown(str(shape))}, expected uint8 (N, H, W, 3) with N above 0"
            )
        if header.fortran:
            raise UserError(f"{path}: {name} is stored in Fortran order: save np.ascontiguousarray of it")
        if shape[0] > MAX_IMAGES or max(shape[1:3]) > MAX_SIDE:
            raise UserError(
                f"{path}: {name} has the shape {shape}: at most {MAX_IMAGES} images with sides of at most {MAX_SIDE} "
                "pixels are scored; resize them"
            )
        self.count, self.height, self.width = min(shape[0], limit or shape[0]), shape[1], shape[2]

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        size = 3 * self.height * self.width
        batch = max(1, min(batch, BATCH_BYTES // size))
        with self.file.open(self.name) as member:
            for first in range(0, self.count, batch):
                shape = (min(batch, self.count - first), self.height, self.width, 3)
                data = member.read(shape[0] * size)
                if len(data) < shape[0] * size:
                    raise UserError(f"{self.path}: {self.name} is truncated: create it again")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(shape)

    def labels(self) -> np.ndarray | None:
        if "arr_1" not in self.file.names():
            return None
        header = self.file.header("arr_1")
        if len(header.shape) != 1 or header.dtype.kind not in "iu" or not self.count <= header.shape[0] <= MAX_IMAGES:
            return None
        return self.file.read("arr_1")[: self.count]

    def sha256(self) -> str:
        return sha256(self.path)


class TokenImages:
    """Reconstructions from the real images' codes: the best result that a model of these codes can have."""

    resized: Mapping[str, int] = {}

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path | None,
        limit: int | None = None,
        device: torch.device | str = "cpu",
        data: DataConfig | None = None,
    ):
        self.path, self.device = path, torch.device(device)
        self.shards = ShardSet(path, data=data)
        manifest = self.shards.manifest
        if tokenizer is None:
            raise UserError(f"{path} contains token shards: name the tokenizer that decodes them with --real-tokenizer")
        if not manifest.tokenizer_sha256:
            logger.warning("%s records no tokenizer hash: that %s made its codes cannot be checked", path, tokenizer)
        elif (digest := tokenizer_hash(tokenizer)) != manifest.tokenizer_sha256:
            raise UserError(
                f"tokenizer {tokenizer} has the hash {digest[:12]}, but the shards {path} were encoded with "
                f"{manifest.tokenizer_sha256[:12]}: name the tokenizer that encoded them"
            )
        config, _ = read_tokenizer_metadata(tokenizer)
        if (config.grid, config.codebook_size) != (manifest.grid, manifest.codebook_size):
            raise UserError(
                f"tokenizer {tokenizer} has {config.codebook_size} codes on a {config.grid} x {config.grid} grid, {path} has "
                f"{manifest.codebook_size} on {manifest.grid} x {manifest.grid}: name the tokenizer that encoded them"
            )
        self.tokenizer = Path(tokenizer)
        self.count = min(len(self.shards), limit or len(self.shards))
        self.height = self.width = config.image_size
        if manifest.centre_note:
            logger.warning("%s: %s", path, manifest.centre_note)

    @torch.no_grad()
    def batches(self, batch: int) -> Iterator[np.ndarray]:
        model = load_tokenizer(self.tokenizer, self.device)
        centre = self.shards.manifest.centre_view
        for first in range(0, self.count, batch):
            ids = np.arange(first, min(first + batch, self.count))
            codes, _ = self.shards.gather(ids, np.full((len(ids), 1), centre))  # (B, 1, T)
            yield to_pixels(model.decode_codes(torch.from_numpy(codes[:, 0].astype(np.int64)).to(self.device)))

    def labels(self) -> np.ndarray:
        return self.shards.gather(np.arange(self.count), np.zeros((self.count, 1), np.int64))[1]

    def sha256(self) -> str:
        """Of the shards' hashes in the manifest, and of the tokenizer's file, which includes the decoder."""
        manifest = self.shards.manifest
        digest = hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode())
        if "writer" in manifest.made_by and manifest.centre_view:  # can be indexed again with another centre view
            digest.update(f"view {manifest.centre_view}".encode())
        _add_file(digest, self.tokenizer)
        return digest.hexdigest()


def sizes_of(resized: Mapping[str, int]) -> str:
    """``30 of 64 x 64, 7 of 48 x 32`` and how many other sizes there are."""
    usual = sorted(resized.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(usual) - 3} other sizes" if len(usual) > 3 else ""
    return ", ".join(f"{n} of {size}" for size, n in usual[:3]) + more


def npz_names(path: Path) -> list[str]:
    """The names of an .npz's arrays. Raises ``UserError``."""
    if not path.exists():
        raise UserError(f"{path} does not exist: name a folder, a .tar, an .npz or token shards")
    return NpzFile(path).names()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with open_regular(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
