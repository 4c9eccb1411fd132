"""Pictures to score, from a folder, tars, or an .npz, and the hash that names them."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console

from megastar.data.pictures import PictureError, PictureSet, center_crop
from megastar.errors import UserError

NPZ_NAMES = ("arr_0", "images")


def load_images(
    path: str | Path,
    *,
    subset: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    console: Console | None = None,
) -> np.ndarray:
    """Pictures as uint8 (N, H, W, 3).

    ``path`` is a folder of pictures, a picture tar (or folder of tars), or an .npz with ``arr_0`` or ``images``.
    Folders and tars are cut to a centre square of ``size`` pixels (default: the first picture's short side); an .npz
    is taken as it is. ``limit`` keeps the first that many in order of their keys. Unreadable pictures are left out,
    counted and named on the console. Raises ``UserError``.
    """
    path = Path(path)
    if path.suffix == ".npz":
        images = _from_npz(path)[:limit]
        if size is not None and images.shape[1:3] != (size, size):
            raise UserError(
                f"{path} holds pictures of {images.shape[2]} x {images.shape[1]} pixels, {size} x {size} are needed"
            )
        return images
    pictures = PictureSet(path, subset)
    count = min(len(pictures), limit or len(pictures))
    side = size or _first_side(pictures)

    def read(i: int) -> np.ndarray | str:
        try:
            return np.asarray(center_crop(pictures.read(i), side))
        except PictureError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
        read_ones = list(pool.map(read, range(count)))
    good = [x for x in read_ones if isinstance(x, np.ndarray)]
    bad = [x for x in read_ones if isinstance(x, str)]
    if bad and console is not None:
        console.print(f"{path}: {len(bad)} of {count} pictures left out: {'; '.join(bad[:3])}", markup=False)
    if not good:
        raise UserError(f"{path}: none of {count} pictures can be read; the first: {bad[0]}")
    return np.stack(good)


def source_hash(path: str | Path, *, subset: str | None = None) -> str:
    """SHA-256 of what ``load_images`` reads: the bytes of the files and the keys, not their dates or folder."""
    path, digest = Path(path), hashlib.sha256()
    if path.suffix == ".npz":
        _add_file(digest, path)
        return digest.hexdigest()
    pictures = PictureSet(path, subset).pictures
    if pictures[0].offset < 0:
        for p in pictures:
            digest.update(p.key.encode() + b"\0")
            _add_file(digest, p.file)
        return digest.hexdigest()
    digest.update((subset or "").strip("/").encode() + b"\0")
    for tar in sorted({p.file for p in pictures}):
        _add_file(digest, tar)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)


def _first_side(pictures: PictureSet) -> int:
    for i in range(len(pictures)):
        try:
            return min(pictures.read(i).size)
        except PictureError:
            continue
    raise UserError(f"{pictures.source}: none of its {len(pictures)} pictures can be read")


def _from_npz(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"pictures {path} do not exist: name a folder, a .tar, or an .npz with arr_0 or images")
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = next((n for n in NPZ_NAMES if n in archive.files), None)
            if name is None:
                raise UserError(f"{path} holds {', '.join(archive.files) or 'nothing'}: expected arr_0 or images")
            images = archive[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable .npz ({error}): make it again") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise UserError(f"{path}: {name} is {images.dtype} {images.shape}, expected uint8 (N, H, W, 3) with N above 0")
    return images
