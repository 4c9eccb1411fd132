"""`megastar convert --to hf`: write weights and their tokenizer as a folder in the Hub's layout."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megastar.checkpoint.atomic_output import READS_BACK, settle, staged
from megastar.checkpoint.find_tokenizer import SHORT, recorded_identity
from megastar.checkpoint.hub import layout
from megastar.checkpoint.hub.card import CardFacts, model_card
from megastar.checkpoint.safetensors_stream import TensorWriter
from megastar.checkpoint.source import elements_of
from megastar.config.env_text import recorded
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import metadata_of
from megastar.tokenizer.io import read_tokenizer_metadata, tokenizer_hash
from megastar.utils.device import DTYPES
from megastar.utils.files import sha256, write_json
from megastar.utils.progress_bar import progress_bar
from megastar.version import __version__

Shapes = dict[str, tuple[int, ...]]
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class HubContent:
    """What a folder is written from: a network's weights, its tokenizer, and facts for the model card."""

    cfg: ModelConfig
    provenance: dict[str, Any]
    shapes: Shapes
    read: Callable[[str], Tensor]
    tokenizer: Path
    facts: CardFacts = field(default_factory=CardFacts)
    verify: Callable[[], None] = lambda: None


def write_folder(
    out: Path,
    content: HubContent,
    *,
    dtype: str = "fp32",
    force: bool = False,
    console: Console | None = None,
    shard_bytes: int = layout.SHARD_BYTES,
) -> str:
    """Write the folder ``out``; returns how it was checked. Raises ``UserError`` and leaves ``out`` unchanged."""
    identity = tokenizer_hash(content.tokenizer)
    known = recorded_identity(content.provenance)
    if known and known != identity:
        raise UserError(
            f"these weights were trained on codes of the tokenizer {known[:SHORT]}, but {content.tokenizer} has the hash "
            f"{identity[:SHORT]}: name the tokenizer of the training with --tokenizer"
        )
    provenance = {**content.provenance, "tokenizer": identity}
    kind = DTYPES[dtype]
    size = elements_of(content.shapes) * kind.itemsize
    files = split_files(content.shapes, kind.itemsize, shard_bytes)
    with staged(out, size + content.tokenizer.stat().st_size + (1 << 20), force, layout.HOLDS) as folder:
        content.verify()
        hashes: dict[str, dict[str, Any]] = {}
        with progress_bar(console, "writing", size, bytes=True, transient=True) as bar:
            for name, weights in files.items():
                one = len(files) == 1
                metadata = metadata_of(content.cfg, provenance) if one else {"format": layout.SHARD_FORMAT}
                with TensorWriter(folder / name, {w: (kind, content.shapes[w]) for w in weights}, metadata) as writer:
                    for weight in weights:
                        writer.write(weight, _cast(content.read(weight), kind, weight))
                        bar.advance(math.prod(content.shapes[weight]) * kind.itemsize)
                hashes[name] = {"bytes": writer.bytes, "sha256": writer.sha256}
        for name, entry in hashes.items():
            settle(folder / name)
            if sha256(folder / name) != entry["sha256"]:
                raise UserError(f"{folder / name} {READS_BACK}")
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": {w: n for n, ws in files.items() for w in ws}}
            write_json(folder / layout.INDEX, index)
        whole = _write_tokenizer(folder, content.tokenizer, identity)
        write_json(
            folder / layout.CONFIG,
            {
                "model_type": layout.MODEL_TYPE, "megastar_format": layout.FORMAT, "megastar_version": __version__,
                "torch_dtype": NAMES[dtype], "model": recorded(asdict(content.cfg)), "provenance": provenance,
                "weights": hashes, "tokenizer": {"folder": layout.TOKENIZER, "sha256": identity, "file_sha256": whole},
            },
        )  # fmt: skip
        config, _ = read_tokenizer_metadata(content.tokenizer)
        write_json(folder / layout.PREPROCESSOR, preprocessor(config.image_size))
        card = model_card(content.cfg, provenance, config, content.facts, elements_of(content.shapes), NAMES[dtype])
        (folder / layout.CARD).write_text(card, encoding="utf-8")
    parts = f"{len(files)} weights files" if len(files) > 1 else layout.WEIGHTS
    return f"{parts}: SHA-256 read back as written; tokenizer {identity[:SHORT]}"


def split_files(shapes: Shapes, itemsize: int, most: int) -> dict[str, list[str]]:
    """File name -> its weights, in order, each file at most ``most`` bytes unless one weight is larger."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {layout.WEIGHTS: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def preprocessor(image_size: int) -> dict[str, Any]:
    """How an image becomes the tokenizer's input: data/images/dataset.py ``center_crop``, tokenizer/vq.py ``to_images``."""
    return {
        "image_processor_type": "megastar",
        "do_resize": True, "do_center_crop": True, "size": {"height": image_size, "width": image_size},
        "resample": "box while the shorter side is at least twice the size, then bicubic, as in ADM",
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "data_format": "channels_first, RGB",
    }  # fmt: skip


def _cast(whole: Tensor, kind: torch.dtype, name: str) -> Tensor:
    if kind == torch.float16 and bool((whole.abs().amax() > torch.finfo(kind).max) & whole.isfinite().all()):
        raise UserError(f"{name} reaches {whole.abs().amax():.3g}, beyond fp16's 65504: use --dtype bf16")
    return whole.to(kind)


def _write_tokenizer(folder: Path, tokenizer: Path, identity: str) -> str:
    """Copy it; the SHA-256 of the whole file, whose decoder ``identity`` does not cover."""
    whole = sha256(tokenizer)
    target = folder / layout.TOKENIZER / layout.TOKENIZER_FILE
    target.parent.mkdir()
    shutil.copyfile(tokenizer, target)
    settle(target)
    if sha256(target) != whole or tokenizer_hash(target) != identity:
        raise UserError(f"{target} {READS_BACK}")
    config, provenance = read_tokenizer_metadata(target)
    write_json(
        target.parent / layout.CONFIG,
        {
            "model_type": "megastar-tokenizer", "megastar_format": layout.FORMAT, "sha256": identity,
            "tokenizer": recorded(asdict(config)), "provenance": provenance,
        },
    )  # fmt: skip
    return whole
