"""Writing token shards: plain WebDataset tars, whole or not there.

A shard holds three members a sample: ``KEY.cls`` (the class, ASCII), ``KEY.codes.npy`` (uint16, (views, T)) and
``KEY.json`` ({"source": key of the picture}).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from types import TracebackType

import numpy as np

from megastar.data.files import sha256, sync_folder
from megastar.data.manifest import LAYOUTS, MAX_CODEBOOK, ShardInfo
from megastar.errors import UserError


def open_writer(path: str | Path, layout: str = "plain") -> ShardWriter:
    """The writer of one shard of that layout."""
    assert layout in LAYOUTS, layout
    return ShardWriter(path)


class ShardWriter:
    """Writes one shard; it appears under its name only when the ``with`` block ends without an error.

    The bytes depend on the samples alone: no times, no owners.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.samples = 0
        self._temporary = self.path.with_name(self.path.name + ".tmp")

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, codes: np.ndarray, label: int, source: str) -> None:
        """Append a sample: ``codes`` (views, T) integers below 65536, its class, the key of its picture."""
        assert "." not in key and codes.ndim == 2, (key, codes.shape)
        if codes.min() < 0 or codes.max() >= MAX_CODEBOOK:
            raise UserError(
                f"code {int(codes.max())} of {source!r} does not fit in 16 bits: the code book may have {MAX_CODEBOOK} codes"
            )
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.ascontiguousarray(codes, dtype="<u2"), version=(1, 0), allow_pickle=False)
        note = json.dumps({"source": source}, ensure_ascii=False).encode()
        for extension, data in (("cls", str(int(label)).encode()), ("codes.npy", npy.getvalue()), ("json", note)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self.samples += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()
            return
        self._file.close()
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def info(self) -> ShardInfo:
        """What the manifest says about the finished shard."""
        return ShardInfo(self.path.name, self.samples, self.path.stat().st_size, sha256(self.path))
