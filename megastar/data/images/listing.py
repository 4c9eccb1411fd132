"""A listing of images: a million entries in a few columns, sorted by key, stored in a file."""

from __future__ import annotations

import io
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastar.data.images.findings import Findings
from megastar.data.images.image_files import SUFFIXES
from megastar.errors import UserError
from megastar.utils.files import write_atomic
from megastar.utils.npz import NpzFile

CLASS_LIMIT = 1_000_000

_MAX_COLUMN = 4 << 30  # bytes; a hundred million images have names of about 3 GB
Stamp = list[Any]  # [path, bytes, mtime in ns or ETag]: while all are unchanged, the listing is current


@dataclass
class Listing:
    """The images of a source, sorted by key; a row of each column per image."""

    names: bytes  # concatenated, with suffix, in UTF-8 (or the bytes of the file system)
    ends: np.ndarray  # (n,) int64: the end of each name
    folder: np.ndarray  # (n,) int32: index of the parent folder in ``folders``
    tar: np.ndarray  # (n,) int32: index of the tar in ``files``; -1: a plain file
    offset: np.ndarray  # (n,) int64 in the tar
    size: np.ndarray  # (n,) int64
    label: np.ndarray  # (n,) int64: index in ``values`` of the class from a companion or list; -1: none
    values: list[str]  # the classes as written, distinct, in order of appearance
    folders: list[str]
    files: list[str]  # tars, as paths below the source or names of objects
    stamps: list[Stamp]
    findings: Findings

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, i: int) -> bytes:
        return self.names[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]

    def save(self, path: Path) -> None:
        columns: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        about = [self.values, self.folders, self.files, self.stamps, self.findings.to_json()]
        lists = json.dumps(about).encode()
        buffer = io.BytesIO()
        np.savez(buffer, names=np.frombuffer(self.names, np.uint8), about=np.frombuffer(lists, np.uint8), **columns)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Listing | None:
        """Read what ``save`` wrote; None for a file that is missing or broken."""
        try:
            archive = NpzFile(path)
            columns: dict[str, Any] = {k: archive.read(k, "iu", _MAX_COLUMN) for k in archive.names()}
            values, folders, files, stamps, found = json.loads(columns.pop("about").tobytes())
            names, findings = columns.pop("names").tobytes(), Findings(**found)
            lists = {"values": values, "folders": folders, "files": files, "stamps": stamps}
            return cls(names=names, findings=findings, **lists, **columns)
        except (UserError, ValueError, KeyError, TypeError, RecursionError):
            return None


class ListingBuilder:
    """Collects the rows of a ``Listing``."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.suffixes: list[bytes] = []
        self._suffix: dict[bytes, bytes] = {}  # so that a million equal suffixes are one object
        self.columns = {k: array("q") for k in ("folder", "tar", "offset", "size", "label")}
        self.folders: dict[bytes, int] = {}
        self.values: dict[str, int] = {}
        self.files: list[str] = []
        self.stamps: list[Stamp] = []
        self.findings = Findings()

    def add(self, name: bytes, tar: int, offset: int, size: int, value: str | None) -> None:
        """Add an image; ``value`` is its class from a companion or list, if any."""
        label = -1 if value is None else self.values.setdefault(value, len(self.values))
        stem, dot, suffix = name.rpartition(b".")
        folder = self.folders.setdefault(name.rpartition(b"/")[0], len(self.folders))
        row = (folder, tar, offset, size, label)
        for column, number in zip(self.columns.values(), row, strict=True):
            column.append(number)
        self.keys.append(stem)
        self.suffixes.append(self._suffix.setdefault(suffix := dot + suffix, suffix))

    def listing(self) -> Listing:
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)  # stable for equal keys
        names, ends = bytearray(), np.empty(len(order), np.int64)
        for row, i in enumerate(order):
            names += self.keys[i]
            names += self.suffixes[i]
            ends[row] = len(names)
        rows = np.array(order, np.int64)
        folder, tar, offset, size, label = (np.array(column, np.int64)[rows] for column in self.columns.values())
        folder, tar, folders = folder.astype(np.int32), tar.astype(np.int32), [text(f) for f in self.folders]
        lists = list(self.values), folders, self.files, self.stamps, self.findings
        return Listing(bytes(names), ends, folder, tar, offset, size, label, *lists)


def text(name: bytes) -> str:
    """A name as text. Bytes that are not UTF-8 are escaped, so that every name can be written as JSON."""
    return name.decode("utf-8", "backslashreplace")


def key_of(name: bytes) -> str:
    """The name without the image suffix; other dots are kept, so that keys stay distinct."""
    return text(name.rpartition(b".")[0])


def is_image(name: bytes) -> bool:
    return name.lower().endswith(tuple(s.encode() for s in SUFFIXES))
