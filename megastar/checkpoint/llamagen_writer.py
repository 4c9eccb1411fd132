"""A weights file in LlamaGen's layout: what torch.save writes of {"model": {name: tensor}}, written tensor by tensor.

torch.save wants all tensors at once. Its file is a plain zip: ``data.pkl`` says which part of which storage a tensor
is, ``data/0``, ``data/1`` ... are the storages' bytes. Written one after another they need memory for one.
LlamaGen (github.com/FoundationVision/LlamaGen, autoregressive/sample/sample_c2i.py) loads ``checkpoint["model"]``
without complaint about missing names, so names and shapes are checked here.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.atomic_output import byte_bar, settle, staged
from megastar.checkpoint.source import Source, bytes_of
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import check_fits
from megastar.utils.device import DTYPES

# (n_layer, n_head, dim) of autoregressive/models/gpt.py
SIZES = {
    (12, 12, 768): "GPT-B",
    (24, 16, 1024): "GPT-L",
    (36, 20, 1280): "GPT-XL",
    (48, 24, 1536): "GPT-XXL",
    (48, 40, 2560): "GPT-XXXL",
    (22, 32, 2048): "GPT-1B",
    (24, 32, 3200): "GPT-3B",
    (32, 32, 4096): "GPT-7B",
}
STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage}
ALIGNMENT = 64  # bytes, as torch.save's: so that the file can be memory-mapped


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Weight:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes ``_Weight`` as torch writes a tensor."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", STORAGES[obj.dtype], obj.key, "cpu", obj.numel)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Weight):
            return NotImplemented
        stride = tuple(math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape)))
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())


def save_streaming(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    more: dict[str, Any],
) -> dict[str, str]:
    """``torch.save({"model": {name: read(name)}, **more}, path)``; returns the SHA-256 of each tensor's bytes."""
    model = {n: _Weight(_Storage(dtype, str(i), math.prod(s)), s) for i, (n, s) in enumerate(shapes.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({"model": model, **more})
    digests = {}
    with path.open("wb") as f, zipfile.ZipFile(f, "w") as archive:

        def record(name: str, data: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            info.file_size = len(data)
            zip64 = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # as zipfile decides
            data_at = f.tell() + 30 + len(info.filename.encode()) + zip64 + 4
            padding = -data_at % ALIGNMENT
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w") as entry:
                entry.write(data)

        record("data.pkl", pickled.getvalue())
        record("byteorder", b"little")
        for name, weight in model.items():
            tensor = read(name)
            assert tensor.dtype == dtype and tuple(tensor.shape) == weight.shape, name
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            digests[name] = hashlib.sha256(data).hexdigest()
            record(f"data/{weight.storage.key}", data)
        record("version", b"3\n")
    return digests


def check_written(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, digests: dict[str, str], advance: Any
) -> None:
    """Load the file as LlamaGen does, then compare every tensor's bytes. Raises ``UserError``."""
    try:
        model = torch.load(path, weights_only=True, mmap=True)["model"]  # touches no weight
        found = {n: (tuple(t.shape), t.dtype) for n, t in model.items()}
        good = found == {n: (s, dtype) for n, s in shapes.items()}
        del model
        with zipfile.ZipFile(path) as archive:
            for i, name in enumerate(shapes):
                digest = hashlib.sha256()
                with archive.open(f"{path.stem}/data/{i}") as entry:
                    while block := entry.read(1 << 20):
                        digest.update(block)
                        advance(len(block))
                good &= digest.hexdigest() == digests[name]
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} was written but does not read back ({error}): check the disk") from error
    if not good:
        raise UserError(f"{path} was written but reads back otherwise: check the disk")


def how_to_load(m: ModelConfig) -> str:
    """The options of LlamaGen's sampler for this network, or how to build it there."""
    name = SIZES.get((m.n_layer, m.n_head, m.dim))
    defaults = ModelConfig()
    usual = (m.rope_base, m.norm_eps) == (defaults.rope_base, defaults.norm_eps)
    if name and usual and m.multiple_of == defaults.multiple_of:
        sizes = f"--codebook-size {m.vocab_size} --num-classes {m.num_classes} --image-size {16 * m.grid}"
        return f"--gpt-model {name} {sizes}"
    fields = ("n_layer", "n_head", "dim", "multiple_of", "rope_base", "norm_eps", "vocab_size", "num_classes")
    said = ", ".join(f"{f}={getattr(m, f)}" for f in fields)
    return f"no size that LlamaGen names: Transformer(ModelArgs({said}, block_size={m.image_tokens}))"


def to_llamagen(source: Source, out: Path, weights: str, dtype: str, force: bool) -> str:
    """Write ``out`` (a .pt file); returns what was written and how it was checked."""
    shapes, kind = source.weights, DTYPES[dtype]
    check_fits(source.folder, shapes, source.cfg.model)
    size = bytes_of(shapes, dtype)
    with staged(out, size + 512 * len(shapes), force) as path:
        source.verify()
        with byte_bar(source.console, "writing", size) as advance:

            def read(name: str) -> Tensor:
                tensor = source.weight(name, weights, kind)
                advance(tensor.numel() * kind.itemsize)
                return tensor

            digests = save_streaming(path, shapes, kind, read, {"megastar": source.provenance(weights)})
        settle(path)
        with byte_bar(source.console, "reading back", size) as advance:
            check_written(path, shapes, kind, digests, advance)
    return f"each tensor's SHA-256 read back as written; LlamaGen: {how_to_load(source.cfg.model)}"
