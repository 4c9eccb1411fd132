"""A weights file in LlamaGen's layout, torch.save's {"model": {name: tensor}}, written one tensor at a time.

torch.save needs all tensors in memory. Its file is a plain zip: ``data.pkl`` maps each tensor to a part of a storage,
``data/0``, ``data/1`` ... are the storages' bytes. LlamaGen (github.com/FoundationVision/LlamaGen,
autoregressive/sample/sample_c2i.py) loads ``checkpoint["model"]`` and ignores missing names, so names and shapes are
checked here.
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

from megastar.checkpoint.atomic_output import READS_BACK
from megastar.checkpoint.safetensors_stream import byte_view
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.utils.progress_bar import ProgressBar

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
VQ_MULTIPLIERS = {(1, 1, 2, 2, 4): "VQ-16", (1, 2, 2, 4): "VQ-8"}
ALIGNMENT = 64  # bytes, as torch.save aligns storages for memory mapping


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
    """Pickles ``_Weight`` as torch pickles a tensor."""

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
            data = byte_view(tensor.contiguous())
            digests[name] = hashlib.sha256(data).hexdigest()
            record(f"data/{weight.storage.key}", data)
        record("version", b"3\n")
    return digests


def check_written(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, digests: dict[str, str], bar: ProgressBar
) -> None:
    """Load the file as LlamaGen does, then compare every tensor's bytes. Raises ``UserError``."""
    try:
        model = torch.load(path, weights_only=True, mmap=True)["model"]  # reads no weight
        found = {n: (tuple(t.shape), t.dtype) for n, t in model.items()}
        good = found == {n: (s, dtype) for n, s in shapes.items()}
        del model
        with zipfile.ZipFile(path) as archive:
            for i, name in enumerate(shapes):
                digest = hashlib.sha256()
                with archive.open(f"{path.stem}/data/{i}") as entry:
                    while block := entry.read(1 << 20):
                        digest.update(block)
                        bar.advance(len(block))
                good &= digest.hexdigest() == digests[name]
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} {READS_BACK} ({error})") from error
    if not good:
        raise UserError(f"{path} {READS_BACK}")


def check_expressible(cfg: ModelConfig | TokenizerConfig, path: Path) -> None:
    """Raises ``UserError`` for a network that LlamaGen does not have."""
    if isinstance(cfg, TokenizerConfig) and cfg.quantizer != "vq":
        raise UserError(f"{path}: LlamaGen has no quantizer {cfg.quantizer}, only vq: convert to safetensors")
    if isinstance(cfg, ModelConfig) and cfg.head != "full":
        raise UserError(f"{path}: LlamaGen has no {cfg.head} head: convert to safetensors")
    if isinstance(cfg, ModelConfig) and cfg.target_position != "none":
        raise UserError(
            f"{path}: LlamaGen has no random token order (model.target_position {cfg.target_position}): convert to safetensors"
        )


def how_to_load(cfg: ModelConfig | TokenizerConfig) -> str:
    """The options of LlamaGen's sampler for this network or tokenizer, or how to build it there."""
    return how_to_load_model(cfg) if isinstance(cfg, ModelConfig) else how_to_load_tokenizer(cfg)


def how_to_load_tokenizer(cfg: TokenizerConfig) -> str:
    name = VQ_MULTIPLIERS.get(tuple(cfg.channel_multipliers)) if (cfg.channels, cfg.norm_groups) == (128, 32) else None
    if name is None:
        return "LlamaGen has no name for this tokenizer"
    return f"--vq-model {name} --codebook-size {cfg.codebook_size} --codebook-embed-dim {cfg.codebook_embed_dim}"


def how_to_load_model(m: ModelConfig) -> str:
    name = SIZES.get((m.n_layer, m.n_head, m.dim))
    defaults = ModelConfig()
    usual = (m.rope_base, m.norm_eps) == (defaults.rope_base, defaults.norm_eps)
    if name and usual and m.multiple_of == defaults.multiple_of:
        sizes = f"--codebook-size {m.vocab_size} --num-classes {m.num_classes} --image-size {16 * m.grid}"
        return f"--gpt-model {name} {sizes}"
    fields = ("n_layer", "n_head", "dim", "multiple_of", "rope_base", "norm_eps", "vocab_size", "num_classes")
    kwargs = ", ".join(f"{f}={getattr(m, f)}" for f in fields)
    return f"no named size: Transformer(ModelArgs({kwargs}, block_size={m.image_tokens}))"
