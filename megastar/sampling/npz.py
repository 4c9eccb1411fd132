"""Pictures in ADM's layout: an .npz with arr_0, uint8 (N, H, W, 3), and arr_1, the classes (N,) int64.

Written member by member and in pieces: 50,000 pictures of 256 x 256 are 9.8 GB and never in memory at once. The bytes
depend on the pictures alone. Source of the layout: guided-diffusion's evaluations/evaluator.py, which reads arr_0.
"""

from __future__ import annotations

import json
import os
import socket
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megastar.errors import UserError
from megastar.utils.files import sync_folder, write_atomic


def record_of(npz: Path) -> Path:
    """SAMPLES.npz.json: what the pictures of SAMPLES.npz depend on, read by whoever scores them."""
    return npz.with_name(npz.name + ".json")


def write_record(path: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """``identity``: what the pictures depend on; ``about``: where it came from. They share no name."""
    assert not set(identity) & set(about), set(identity) & set(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps({"identity": dict(identity), "about": dict(about)}, indent=1) + "\n").encode())


def save_npz(path: Path, shape: tuple[int, ...], pictures: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write ``shape`` (N, H, W, 3) of ``pictures``, which come in pieces, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            with zipfile.ZipFile(f, "w") as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, about)
                    written = 0
                    for some in pictures:
                        assert some.dtype == np.uint8 and some.shape[1:] == shape[1:], (some.dtype, some.shape)
                        member.write(memoryview(np.ascontiguousarray(some)).cast("B"))
                        written += len(some)
                assert written == shape[0] == len(labels), (written, shape, len(labels))
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels, "<i8"), version=(1, 0), allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and classes of a small one, a part. Raises ``UserError`` for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["arr_0"], archive["arr_1"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and start again, only it is drawn anew") from error
