"""Images in ADM's layout: an .npz with arr_0, uint8 (N, H, W, 3), and arr_1, the classes (N,) int64.

Written in parts: 50,000 images of 256 x 256 are 9.8 GB and never in memory at once. The bytes depend only on the images
and classes. Source of the layout: guided-diffusion's evaluations/evaluator.py, which reads arr_0.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megastar.errors import UserError
from megastar.utils.files import atomic_file, write_atomic
from megastar.utils.json_file import shown
from megastar.utils.npz import NpzFile

MAX_BYTES = 1 << 30  # of the images of a file whose shape is not known


def record_of(npz: Path) -> Path:
    """SAMPLES.npz.json: what the images of SAMPLES.npz depend on, read when they are scored."""
    return npz.with_name(npz.name + ".json")


def write_record(path: Path, identity: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """``identity``: what the images depend on; ``metadata``: where they came from. They have no key in common."""
    assert not set(identity) & set(metadata), set(identity) & set(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps({"identity": dict(identity), "about": dict(metadata)}, indent=1) + "\n").encode())


def save_npz(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write images of ``shape`` (N, H, W, 3), given in ``parts``, atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for part in parts:
                assert part.dtype == np.uint8 and part.shape[1:] == shape[1:], (part.dtype, part.shape)
                member.write(np.ascontiguousarray(part).data.cast("B"))
                written += len(part)
        assert written == shape[0] == len(labels), (written, shape, len(labels))
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, "<i8"), version=(1, 0), allow_pickle=False)


def read_npz(path: Path, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes of a part. Raises ``UserError`` for a damaged file.

    ``shape`` (N, H, W, 3): the images that the file must hold, of any size; without it at most ``MAX_BYTES`` are read.
    """
    file = NpzFile(path)
    most = (MAX_BYTES, MAX_BYTES) if shape is None else (math.prod(shape), 8 * shape[0])
    try:
        images, labels = file.read("arr_0", "u", most[0]), file.read("arr_1", "iu", most[1])
        if shape is not None and (images.dtype != np.uint8 or (images.shape, labels.shape) != (shape, shape[:1])):
            raise UserError(f"{images.dtype} images {images.shape} of {labels.shape} classes, expected uint8 {shape}")
        return images, labels
    except UserError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and run again; only this part is sampled again"
        ) from error


def read_some(path: Path, shape: tuple[int, ...], indices: Sequence[int]) -> dict[int, np.ndarray]:
    """The images ``indices``, ascending, of a file that holds images of ``shape`` (N, H, W, 3): index -> (H, W, 3) uint8.

    Only these are in memory. Raises ``UserError`` for a file that is damaged or holds images of another shape.
    """
    file, size, found = NpzFile(path), math.prod(shape[1:]), dict[int, np.ndarray]()
    header = file.header("arr_0")
    if header.dtype != np.uint8 or header.shape != shape or header.fortran:
        raise UserError(
            f"{path}: arr_0 is {header.dtype} {shown(str(header.shape))}, expected uint8 {shape}: remove it and run again"
        )
    with file.open("arr_0") as member:
        for i in indices:
            member.seek(header.start + i * size)
            data = member.read(size)
            if len(data) < size:
                raise UserError(f"{path}: arr_0 is truncated: remove it and run again")
            found[i] = np.frombuffer(data, np.uint8).reshape(shape[1:])
    return found
