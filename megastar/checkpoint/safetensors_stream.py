"""Write a safetensors file one tensor at a time, hashing while writing."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int64": "I64"}


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


class TensorWriter:
    """Write ``shapes`` (name -> (dtype, shape)) in that order; the file is renamed to ``path`` when it is complete.

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
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[str(dtype)], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        self.digest, self.bytes = hashlib.sha256(), 0
        self.file = self.temporary.open("wb")
        self._append(len(text).to_bytes(8, "little") + text)

    def _append(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.bytes += len(data)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, cast to its declared type."""
        dtype, shape = self.shapes[name]
        assert self.waiting and self.waiting[0] == name, f"{name} is not the next of {self.waiting[:2]}"
        assert tuple(tensor.shape) == tuple(shape), (name, tuple(tensor.shape), shape)
        self.waiting.pop(0)
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        if flat.numel():
            self._append(byte_view(flat))

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
