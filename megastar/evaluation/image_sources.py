"""Pictures to score, read in order and a batch at a time: from a folder, tars, an .npz, or decoded token shards."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from rich.console import Console

from megastar.data.images.dataset import ImageError, ImageSet, center_crop
from megastar.data.shards.reader import ShardSet
from megastar.data.storage.protocol import is_remote
from megastar.data.storage.shard_info import MANIFEST
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, tokenizer_hash

NPZ_NAMES = ("arr_0", "images")


class ImageSource(Protocol):
    """``count`` pictures of ``height`` x ``width``; a few of a folder's may turn out unreadable."""

    count: int
    height: int
    width: int

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3), each picture once, in order."""
        ...

    def labels(self) -> np.ndarray | None:
        """Classes (N,), where the source knows them."""
        ...

    def sha256(self) -> str:
        """Hash of what ``batches`` reads: the bytes of the files and the keys, not their dates or folder."""
        ...


def open_pictures(
    path: str | Path,
    *,
    subset: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    tokenizer: str | Path | None = None,
    console: Console | None = None,
) -> ImageSource:
    """A folder of pictures, a picture tar (or folder of tars), an .npz with ``arr_0`` or ``images``, or token shards.

    Folders and tars are cut to a centre square of ``size`` pixels (default: the first picture's short side). An .npz
    and token shards, decoded by ``tokenizer``, must be of that size. ``limit`` keeps the first that many in order of
    their keys. Unreadable pictures are left out, counted and named on the console. Raises ``UserError``.
    """
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        found: ImageSource = TokenPictures(path, tokenizer, limit)
    elif Path(path).suffix == ".npz":
        found = NpzPictures(Path(path), limit)
    else:
        return FolderPictures(Path(path), subset, size, limit, console)
    if size is not None and (found.height, found.width) != (size, size):
        raise UserError(f"{path} holds pictures of {found.width} x {found.height} pixels, {size} x {size} are needed")
    return found


def load_images(path: str | Path, **known) -> np.ndarray:
    """All pictures of ``open_pictures`` at once: uint8 (N, H, W, 3)."""
    return np.concatenate(list(open_pictures(path, **known).batches(256)))


def source_hash(path: str | Path, *, subset: str | None = None) -> str:
    """SHA-256 of what ``open_pictures`` reads from a folder, tars or an .npz."""
    return open_pictures(path, subset=subset, size=None if Path(path).suffix == ".npz" else 1).sha256()


class FolderPictures:
    """Files below a folder, or members of tars; decoded by threads, one batch ahead."""

    def __init__(self, path: Path, subset: str | None, size: int | None, limit: int | None, console: Console | None):
        self.path, self.subset, self.console = path, subset, console
        self.set = ImageSet(path, subset)
        self.count = min(len(self.set), limit or len(self.set))
        self.height = self.width = size or self._first_side()

    def _first_side(self) -> int:
        for i in range(len(self.set)):
            try:
                return min(self.set.read(i).size)
            except ImageError:
                continue
        raise UserError(f"{self.path}: none of its {len(self.set)} pictures can be read")

    def _read(self, i: int) -> np.ndarray | str:
        try:
            return np.asarray(center_crop(self.set.read(i), self.height))
        except ImageError as error:
            return str(error)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        bad: list[str] = []
        with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
            waiting = [pool.submit(self._read, i) for i in range(min(batch, self.count))]
            for first in range(0, self.count, batch):
                ahead = range(first + batch, min(first + 2 * batch, self.count))
                now, waiting = waiting, [pool.submit(self._read, i) for i in ahead]
                read = [f.result() for f in now]
                bad += [x for x in read if isinstance(x, str)]
                if good := [x for x in read if isinstance(x, np.ndarray)]:
                    yield np.stack(good)
        if len(bad) == self.count:
            raise UserError(f"{self.path}: none of {self.count} pictures can be read; the first: {bad[0]}")
        if bad and self.console is not None:
            told = f"{self.path}: {len(bad)} of {self.count} pictures left out: {'; '.join(bad[:3])}"
            self.console.print(told, markup=False)

    def labels(self) -> np.ndarray:
        return np.array([p.label for p in self.set.images[: self.count]])

    def sha256(self) -> str:
        digest, pictures = hashlib.sha256(), self.set.images
        if pictures[0].offset < 0:
            for p in pictures:
                digest.update(p.key.encode() + b"\0")
                _add_file(digest, p.file)
            return digest.hexdigest()
        digest.update((self.subset or "").strip("/").encode() + b"\0")
        for tar in sorted({p.file for p in pictures}):
            _add_file(digest, tar)
        return digest.hexdigest()


class NpzPictures:
    """ADM's layout, read from the archive as it is needed: 50,000 pictures of 256 x 256 are 9.8 GB, never in memory."""

    def __init__(self, path: Path, limit: int | None = None):
        self.path = path
        if not path.is_file():
            raise UserError(f"pictures {path} do not exist: name a folder, a .tar, or an .npz with arr_0 or images")
        with _readable(path), zipfile.ZipFile(path) as archive:
            self.names = [n.removesuffix(".npy") for n in archive.namelist()]
            name = next((n for n in NPZ_NAMES if n in self.names), None)
            if name is None:
                raise UserError(f"{path} holds {', '.join(self.names) or 'nothing'}: expected arr_0 or images")
            self.name = name
            with archive.open(f"{name}.npy") as member:
                shape, fortran, dtype = _header(member)
                bytes_there = archive.getinfo(f"{name}.npy").file_size - member.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise UserError(f"{path}: {name} is {dtype} {shape}, expected uint8 (N, H, W, 3) with N above 0")
        if fortran:
            raise UserError(
                f"{path}: {name} is stored column by column (Fortran order): save np.ascontiguousarray of it"
            )
        if bytes_there != np.prod(shape, dtype=object):
            raise UserError(f"{path}: {name} promises {shape} and holds {bytes_there} bytes: make it again")
        self.count, self.height, self.width = min(shape[0], limit or shape[0]), shape[1], shape[2]

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        with _readable(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as member:
            _header(member)
            for first in range(0, self.count, batch):
                shape = (min(batch, self.count - first), self.height, self.width, 3)
                data = member.read(int(np.prod(shape)))
                yield np.frombuffer(bytearray(data), np.uint8).reshape(shape)

    def labels(self) -> np.ndarray | None:
        labels = read_arrays(self.path, ["arr_1"]).get("arr_1")
        known = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) >= self.count
        return labels[: self.count] if known else None

    def sha256(self) -> str:
        digest = hashlib.sha256()
        _add_file(digest, self.path)
        return digest.hexdigest()


class TokenPictures:
    """What a tokenizer makes of the real pictures' codes: the best that any model of these codes can do."""

    def __init__(self, path: str | Path, tokenizer: str | Path | None, limit: int | None = None):
        self.path = path
        self.shards = ShardSet(path)
        manifest = self.shards.manifest
        if tokenizer is None:
            raise UserError(f"{path} holds token shards: name the tokenizer that decodes them, with --real-tokenizer")
        if tokenizer_hash(tokenizer) != manifest.tokenizer_sha256:
            raise UserError(
                f"tokenizer {tokenizer} has the hash {tokenizer_hash(tokenizer)[:12]}, the shards {path} were made with "
                f"{manifest.tokenizer_sha256[:12]}: name the tokenizer that made them"
            )
        self.tokenizer = Path(tokenizer)
        self.count = min(len(self.shards), limit or len(self.shards))
        self.height = self.width = manifest.image_size

    @torch.no_grad()
    def batches(self, batch: int) -> Iterator[np.ndarray]:
        model = load_tokenizer(self.tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
        device = next(model.parameters()).device
        centre = self.shards.manifest.centre_view
        for first in range(0, self.count, batch):
            ids = np.arange(first, min(first + batch, self.count))
            codes, _ = self.shards.gather(ids, np.full((len(ids), 1), centre))  # (B, 1, T)
            yield to_pixels(model.decode_codes(torch.from_numpy(codes[:, 0].astype(np.int64)).to(device)))

    def labels(self) -> np.ndarray:
        return self.shards.gather(np.arange(self.count), np.zeros((self.count, 1), np.int64))[1]

    def sha256(self) -> str:
        """Of the shards' hashes, as their manifest has them, and the tokenizer's file, whose decoder matters too."""
        digest = hashlib.sha256("".join(s.sha256 for s in self.shards.manifest.shards).encode())
        _add_file(digest, self.tokenizer)
        return digest.hexdigest()


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Those of ``names`` that an .npz holds. Raises ``UserError``."""
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        return {n: archive[n] for n in names if n in archive.files}


def npz_names(path: Path) -> list[str]:
    """What an .npz holds. Raises ``UserError``."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a folder, a .tar, an .npz or token shards")
    with _readable(path), zipfile.ZipFile(path) as archive:
        return [n.removesuffix(".npy") for n in archive.namelist()]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise UserError(f"{path} is not a readable .npz ({error}): make it again") from error


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
