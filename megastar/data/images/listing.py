"""A listing of pictures: a million entries in a few columns, sorted by key, kept in a file."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastar.errors import UserError
from megastar.utils.files import write_atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
CLASS_LIMIT = 1_000_000

Stamp = list  # [path, bytes, mtime in ns or ETag]: as long as all are the same, so is the listing


@dataclass
class Listing:
    """The pictures of a source, sorted by key: columns of one row a picture."""

    names: bytes  # all names on end: with the suffix, UTF-8 (or what the file system has)
    ends: np.ndarray  # (n,) int64: where each name ends
    folder: np.ndarray  # (n,) int32: number of its parent folder in ``folders``
    tar: np.ndarray  # (n,) int32: number of its tar in ``files``; -1: a file of its own
    offset: np.ndarray  # (n,) int64 in the tar
    size: np.ndarray  # (n,) int64
    label: np.ndarray  # (n,) int64: the class that a .cls or a list gives, or -1: the folder's name is it
    classes: list[str]  # names of a list's classes, by number; empty: numbers are all there is
    folders: list[str]
    files: list[str]  # tars, as paths below the source or names of objects
    stamps: list[Stamp]

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, i: int) -> bytes:
        return self.names[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]

    def save(self, path: Path) -> None:
        columns = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        about = json.dumps([self.classes, self.folders, self.files, self.stamps]).encode()
        buffer = io.BytesIO()
        np.savez(buffer, names=np.frombuffer(self.names, np.uint8), about=np.frombuffer(about, np.uint8), **columns)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Listing | None:
        """What ``save`` wrote; None for a file that is missing or broken."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                columns = {k: archive[k] for k in archive.files}
            lists = zip(
                ("classes", "folders", "files", "stamps"), json.loads(columns.pop("about").tobytes()), strict=True
            )
            return cls(columns.pop("names").tobytes(), **columns, **dict(lists))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None


class Columns:
    """A listing in the making."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.suffixes: list[bytes] = []
        self._suffix: dict[bytes, bytes] = {}  # one object for a million equal ones
        self.columns = {k: array("q") for k in ("folder", "tar", "offset", "size", "label")}
        self.folders: dict[bytes, int] = {}
        self.classes: list[str] = []
        self.files: list[str] = []
        self.stamps: list[Stamp] = []

    def add(self, name: bytes, tar: int, offset: int, size: int, label: int) -> None:
        stem, dot, suffix = name.rpartition(b".")
        folder = self.folders.setdefault(name.rpartition(b"/")[0], len(self.folders))
        row = (folder, tar, offset, size, label)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.keys.append(stem)
        self.suffixes.append(self._suffix.setdefault(suffix := dot + suffix, suffix))

    def listing(self) -> Listing:
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)  # stable: as found where keys are equal
        names, ends = bytearray(), np.empty(len(order), np.int64)
        for row, i in enumerate(order):
            names += self.keys[i]
            names += self.suffixes[i]
            ends[row] = len(names)
        columns = {
            k: np.frombuffer(v, np.int64)[order] if order else np.empty(0, np.int64) for k, v in self.columns.items()
        }
        for k in ("folder", "tar"):
            columns[k] = columns[k].astype(np.int32)
        folders = [text(f) for f in self.folders]
        lists = {"classes": self.classes, "folders": folders, "files": self.files, "stamps": self.stamps}
        return Listing(bytes(names), ends, **columns, **lists)


def text(name: bytes) -> str:
    """A name as people read it. Bytes that are no UTF-8 come as escapes, so that every name can be written as JSON."""
    return name.decode("utf-8", "backslashreplace")


def key_of(name: bytes) -> str:
    """The whole name less the picture's suffix: names with dots stay apart."""
    return text(name.rpartition(b".")[0])


def parse_label(data: bytes, where: object) -> int:
    try:
        label = int(data)
    except ValueError:
        label = -1
    if not 0 <= label < CLASS_LIMIT:
        raise UserError(f"{where} holds {data[:20]!r}: a class is an integer from 0 to {CLASS_LIMIT - 1}")
    return label


def is_picture(name: bytes) -> bool:
    return name.lower().endswith(tuple(s.encode() for s in SUFFIXES))


def stem_of(name: bytes) -> bytes:
    """WebDataset's rule: a key ends at the first dot of the last path component."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def digest(listing: Listing, labels: np.ndarray, rows: np.ndarray) -> str:
    """SHA-256 of the keys and classes of some rows: another set of pictures gives another one."""
    out = hashlib.sha256()
    for i, label in zip(rows.tolist(), labels.tolist(), strict=True):
        out.update(f"{key_of(listing.name(i))}\t{label}\n".encode())
    return out.hexdigest()
