"""Read a folder in the Hub's layout. Nothing in it is executed; weights are read from .safetensors files only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.checkpoint.hub.layout import (
    CONFIG,
    INDEX,
    SHARD_FORMAT,
    TOKENIZER,
    TOKENIZER_FILE,
    read_config,
    read_index,
)
from megastar.config.from_file import check_section
from megastar.config.rules.model import model_problems
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import check_fits, read_model_header
from megastar.utils.files import sha256
from megastar.utils.weights.safetensors_header import open_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def read_folder(path: Path) -> tuple[ModelConfig, dict[str, Any], Shapes]:
    """Architecture, provenance and shapes of the network in ``path``, checked against the files. Raises ``UserError``."""
    content = read_config(path)
    cfg = ModelConfig(**check_section(ModelConfig, content["model"], f"{path / CONFIG}: model"))
    if problem := next(model_problems(cfg), None):
        raise UserError(f"{path / CONFIG}: {problem.text}; convert it again")
    provenance: dict[str, Any] = content["provenance"]
    if identity := content.get("tokenizer"):
        provenance = provenance | {"tokenizer": identity["sha256"]}
    names = list(content["weights"])
    if len(names) == 1:
        recorded, _, shapes = read_model_header(path / names[0])
        if recorded != cfg:
            raise UserError(
                f"{path}: {CONFIG} and {names[0]} describe different networks: copy or convert the folder again"
            )
    else:
        shapes = _shapes_of_shards(path, names)
    check_fits(path, shapes, cfg)
    return cfg, provenance, shapes


def _shapes_of_shards(path: Path, names: list[str]) -> Shapes:
    index = read_index(path)
    held: dict[str, set[str]] = defaultdict(set)
    for weight, name in index.items():
        held[name].add(weight)
    if set(held) != set(names):
        differ = ", ".join(sorted(set(held) ^ set(names))[:3])
        raise UserError(
            f"{path}: {CONFIG} and {INDEX} name different files ({differ}): copy or convert the folder again"
        )
    shapes: Shapes = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} does not exist, although {INDEX} names it: copy or download the folder again")
        metadata, entries = read_header(file)
        if metadata.get("format") != SHARD_FORMAT:
            raise UserError(
                f"{file}: format {metadata.get('format', 'none')!r:.80}, not a part of megastar weights: convert it again"
            )
        if set(entries) != held[name]:
            raise UserError(f"{file} does not hold the weights that {INDEX} records: copy or convert the folder again")
        shapes |= {weight: entry.shape for weight, entry in entries.items()}
    return {weight: shapes[weight] for weight in index}


def folder_tensors(path: Path) -> Callable[[str], Tensor]:
    """Reads one weight of a folder that ``read_folder`` has checked; each file is opened once."""
    names = list(read_config(path)["weights"])
    if len(names) == 1:
        one = open_tensors(path / names[0])
        return lambda name: one.get_tensor(name)
    index, opened = read_index(path), {name: open_tensors(path / name) for name in names}
    return lambda name: opened[index[name]].get_tensor(name)


def tokenizer_in(path: Path) -> Path | None:
    """The tokenizer file of a folder; None if it has none."""
    file = path / TOKENIZER / TOKENIZER_FILE
    return file if file.is_file() else None


def digest_file(path: Path) -> Path:
    """The file whose hash identifies the weights: the weights file, or of several config.json, which has their hashes."""
    names = list(read_config(path)["weights"])
    return path / (names[0] if len(names) == 1 else CONFIG)


def check_undamaged(path: Path, remedy: str, tokenizer: bool = True) -> None:
    """Raise ``UserError`` for a file whose SHA-256 differs from config.json's. ``tokenizer``: compare its file too."""
    damaged = damaged_files(path) + ([f"{TOKENIZER}/{TOKENIZER_FILE}"] if tokenizer and damaged_tokenizer(path) else [])
    if damaged:
        raise UserError(f"{path / damaged[0]} is damaged: its SHA-256 differs from {CONFIG}'s; {remedy}")


def damaged_tokenizer(path: Path) -> bool:
    """Whether the tokenizer's file has another SHA-256 than config.json records. Its identity does not cover the decoder."""
    file, recorded = tokenizer_in(path), read_config(path).get("tokenizer", {}).get("file_sha256")
    return file is not None and recorded is not None and sha256(file) != recorded


def damaged_files(path: Path) -> list[str]:
    """The weights files whose size or SHA-256 differs from config.json's. Reads all of them."""
    out = []
    for name, entry in read_config(path)["weights"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            out.append(name)
    return out
