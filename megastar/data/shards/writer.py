"""Writes token shards: WebDataset tars with their index, atomically.

plain: three members per sample, ``KEY.cls`` (the class, ASCII), ``KEY.codes.npy`` ((views, T)) and ``KEY.json``
({"source": key of the image}); with features (features.py) also ``KEY.features.npy``. packed: the same members per block of samples, ``KEY.codes.npy`` ((n, views, T)),
``KEY.cls.npy`` (int64, (n,)) and ``KEY.json`` ({"sources": [...]}), where KEY is that of the block's first sample. Codes are
uint16 if the codebook has at most 65,536, else int32 (``code_type``).
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megastar.data.shards.features import NUMPY, StoredFeatures
from megastar.data.shards.index import ShardIndex, pack_index
from megastar.data.shards.manifest import MAX_CODEBOOK
from megastar.data.shards.sample_parser import DTYPES, Expected, check_layout
from megastar.data.storage.shard_info import ShardInfo, index_name
from megastar.errors import UserError
from megastar.utils.files import sha256, sync_folder

_BLOCK_SAMPLES = 256
_BLOCK_BYTES = 1 << 20  # of codes and features: a streaming reader holds one block in memory


def open_writer(
    path: str | Path, layout: str = "plain", dtype: str = "uint16", features: StoredFeatures | None = None
) -> ShardWriter:
    """The writer of one shard in ``layout`` with codes of ``dtype``, and features or none. Raises ``UserError`` for an
    unknown layout."""
    check_layout(layout)
    return (PackedWriter if layout == "packed" else ShardWriter)(path, dtype, features)


class ShardWriter:
    """Writes one plain shard, which appears under its name when the ``with`` block ends without an error.

    The bytes depend on the samples alone: no times, no owners. Several processes may write the same shard at once.
    """

    layout = "plain"

    def __init__(self, path: str | Path, dtype: str = "uint16", features: StoredFeatures | None = None):
        self.path, self.dtype, self.features = Path(path), dtype, features
        self.most = min(int(np.iinfo(dtype).max) + 1, MAX_CODEBOOK)  # codes
        self.samples = 0
        self.shape: tuple[int, int] | None = None  # views, T
        unique = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._temporary = self.path.with_name(self.path.name + unique)
        self._index = self.path.with_name(index_name(self.path.name))
        self._temporary_index = self._index.with_name(self._index.name + unique)
        self._offsets: list[int] = []
        self._labels: list[int] = []
        self._encoded: list[int] = []  # positions of the features

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb", buffering=1 << 20)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, codes: np.ndarray, label: int, source: str, features: np.ndarray | None = None) -> None:
        """Append a sample: ``codes`` (views, T) integers that fit the type, its class, the key of its image, and where the
        set stores features these, (views, P, C) float16."""
        assert "." not in key and codes.ndim == 2, (key, codes.shape)
        assert self.shape in (None, codes.shape), (self.shape, codes.shape)
        if codes.min() < 0 or codes.max() >= self.most:
            raise UserError(
                f"code {int(codes.max())} of {source!r} does not fit {self.dtype}: use a tokenizer with at most {self.most} codes"
            )
        self.shape = codes.shape
        assert (features is None) == (self.features is None)
        if features is not None and self.features is not None:
            assert features.shape == (len(codes), self.features.patches, self.features.width), features.shape
            features = np.ascontiguousarray(features, NUMPY)
        self._write(key, np.ascontiguousarray(codes, dtype=DTYPES[self.dtype]), int(label), source, features)
        self.samples += 1
        self._labels.append(int(label))

    def _write(self, key: str, codes: np.ndarray, label: int, source: str, features: np.ndarray | None) -> None:
        self._member(f"{key}.cls", str(label).encode())
        self._offsets.append(self._array(f"{key}.codes.npy", codes))
        if features is not None:
            self._encoded.append(self._array(f"{key}.features.npy", features))
        self._note(key, {"source": source})

    def _member(self, name: str, data: bytes) -> int:
        """Append a member and return the position of the end of its data."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + len(data)

    def _array(self, name: str, array: np.ndarray) -> int:
        """Append an array and return the position of its first number, which numpy's header aligns to 64 bytes."""
        npy = io.BytesIO()
        np.lib.format.write_array(npy, array, version=(1, 0), allow_pickle=False)
        return self._member(name, npy.getvalue()) - array.nbytes

    def _note(self, key: str, note: dict[str, Any]) -> None:
        self._member(f"{key}.json", json.dumps(note, ensure_ascii=False).encode())

    def _finish(self) -> None:
        """Write what is still buffered."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._describe()
                self._temporary.replace(self.path)
                self._temporary_index.replace(self._index)
                sync_folder(self.path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._temporary_index.unlink(missing_ok=True)

    def _describe(self) -> None:
        """Hash the tar and write its index, which must be newer than the tar."""
        self._info = ShardInfo(self.path.name, self.samples, self._temporary.stat().st_size, sha256(self._temporary))
        expected = Expected(self.dtype, *(self.shape or (0, 0)), features=self.features)
        encoded = None if self.features is None else np.array(self._encoded, np.int64)
        index = ShardIndex(np.array(self._offsets, np.int64), np.array(self._labels, np.int64), encoded)
        with self._temporary_index.open("wb") as f:
            f.write(pack_index(index, self._info, self.layout, expected))
            f.flush()
            os.fsync(f.fileno())

    def info(self) -> ShardInfo:
        """The manifest's entry of the finished shard."""
        return self._info


class PackedWriter(ShardWriter):
    """As ``ShardWriter``, with a block of samples in each member, in the order they were added."""

    layout = "packed"

    def __init__(self, path: str | Path, dtype: str = "uint16", features: StoredFeatures | None = None):
        super().__init__(path, dtype, features)
        self._block: list[tuple[str, np.ndarray, int, str, np.ndarray | None]] = []

    def _write(self, key: str, codes: np.ndarray, label: int, source: str, features: np.ndarray | None) -> None:
        self._block.append((key, codes.copy(), label, source, None if features is None else features.copy()))
        size = codes.nbytes + (0 if features is None else features.nbytes)
        if len(self._block) >= min(_BLOCK_SAMPLES, max(1, _BLOCK_BYTES // size)):
            self._finish()

    def _finish(self) -> None:
        if not self._block:
            return
        keys, codes, labels, sources, features = zip(*self._block, strict=True)
        self._array(f"{keys[0]}.cls.npy", np.array(labels, "<i8"))
        start = self._array(f"{keys[0]}.codes.npy", np.stack(codes))
        self._offsets += [start + i * codes[0].nbytes for i in range(len(codes))]
        if self.features is not None:
            start = self._array(f"{keys[0]}.features.npy", np.stack(features))
            self._encoded += [start + i * features[0].nbytes for i in range(len(features))]
        self._note(keys[0], {"sources": sources})
        self._block = []
