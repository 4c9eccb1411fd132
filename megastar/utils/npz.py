"""Reading an .npz archive: each array's header is compared with the archive before anything is decompressed.

``numpy.load`` allocates whatever size a header or a highly compressed member requests.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megastar.errors import UserError
from megastar.utils.files import open_regular
from megastar.utils.json_file import shown

MAX_ARRAYS = 10_000
MAX_BYTES = 256 << 20  # of an array that is read at once
_BLOCK = 16 << 20
_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others are decompressed without a limit
_ERRORS = (
    OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, NotImplementedError, OverflowError, SyntaxError,
    MemoryError, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """Type and shape of an array, and its position in its member of the archive."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """An .npz of another program. Every method raises a ``UserError`` that names the file and the array."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """The names of the arrays."""
        with self._archive() as archive:
            return list(dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist()))

    def header(self, name: str) -> ArrayHeader:
        with self._archive() as archive:
            return self._header(archive, name)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of an array."""
        with self._archive() as archive:
            start = self._header(archive, name).start
            with archive.open(f"{name}.npy") as member:
                member.read(start)
                yield member

    def read(self, name: str, dtypes: str = "iuf", most: int = MAX_BYTES) -> np.ndarray:
        """A whole array of at most ``most`` bytes, of one of the numpy kinds ``dtypes``."""
        header = self.header(name)
        if header.dtype.kind not in dtypes or header.bytes > most:
            raise self._unreadable(
                f"{name} is {header.dtype} of shape {shown(str(header.shape))}, {header.bytes} bytes, at most {most} can be read"
            )
        with self.open(name) as member:
            data, filled = np.empty(header.bytes, np.uint8), 0
            while block := member.read(min(_BLOCK, header.bytes - filled)):  # a large array is in memory once
                data[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
                filled += len(block)
            if filled != header.bytes or member.read(1):  # the end is where the checksum is compared
                raise self._unreadable(f"{name} is truncated")
        return data.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with open_regular(self.path) as f, zipfile.ZipFile(f) as archive:
                if len(archive.namelist()) > MAX_ARRAYS:
                    raise self._unreadable(f"it has {len(archive.namelist())} members")
                yield archive
        except _ERRORS as error:
            message = " ".join(str(error).split())[:200] or type(error).__name__
            raise self._unreadable(message) from error

    def _header(self, archive: zipfile.ZipFile, name: str) -> ArrayHeader:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type not in _KINDS:
            raise self._unreadable(f"{shown(name)} is compressed by method {info.compress_type}")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(member)
            header = ArrayHeader(dtype, shape, fortran, member.tell())
        if dtype.hasobject:
            raise self._unreadable(f"{name} contains Python objects, which can run code when loaded")
        if min(shape, default=0) < 0 or header.bytes != info.file_size - header.start:
            stored = info.file_size - header.start
            raise self._unreadable(f"{name} has the shape {shown(str(shape))} of {dtype} but {stored} bytes")
        return header

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a readable .npz ({reason}): create it again")
