"""A safetensors file written tensor by tensor: memory for one, not for all, and the hash is known at the end.

It is read by plain reads, of ranges of a tensor where only they are wanted: pages of a memory map would count as the
process's memory until the kernel takes them back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Entry(NamedTuple):
    """Where a tensor lies: its type by safetensors' name, its shape, its first byte in the file and the one after."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a safetensors file. Raises ``ValueError`` for one that is cut, padded or no such file."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(f.read(length))
    metadata = header.pop("__metadata__", {})
    entries, end = {}, 8 + length
    for name, about in header.items():
        start, stop = (8 + length + int(n) for n in about["data_offsets"])
        entries[name] = Entry(about["dtype"], tuple(about["shape"]), start, stop)
        end = max(end, stop)
    if end != size:
        raise ValueError(f"{size} bytes instead of {end}")
    return metadata, entries


class TensorWriter:
    """Write ``shapes`` (name -> (dtype, shape)) in that order; the file appears under its name when all are there.

    >>> with TensorWriter(path, {"w": (torch.float32, (2, 3))}, {"format": "x"}) as out:
    ...     out.write("w", tensor)
    >>> out.sha256, out.bytes
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.shapes = dict(shapes)
        self.waiting = list(self.shapes)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in self.shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        self.digest, self.bytes = hashlib.sha256(), 0
        self.file = self.temporary.open("wb")
        self._append(len(text).to_bytes(8, "little") + text)

    def _append(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, cast to its declared type."""
        dtype, shape = self.shapes[name]
        assert self.waiting and self.waiting[0] == name, f"{name} is not the next of {self.waiting[:2]}"
        assert tuple(tensor.shape) == tuple(shape), (name, tuple(tensor.shape), shape)
        self.waiting.pop(0)
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        if flat.numel():
            self._append(memoryview(flat.view(torch.uint8).numpy()))

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            assert not self.waiting, f"not written: {self.waiting[:3]}"
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)
