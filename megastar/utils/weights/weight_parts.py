"""Weights in several safetensors files, with an index of Hugging Face's layout (NAME.safetensors.index.json) beside them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megastar.errors import UserError
from megastar.utils.files import sha256
from megastar.utils.json_file import ANY, FILE_NAME, WEIGHT_NAME, dict_of, read_json, record, text, validator
from megastar.utils.weights.safetensors_header import open_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors.index.json"
MOST_BYTES = 16 << 20  # of an index
_SCHEMA = validator(record({"weight_map": dict_of(WEIGHT_NAME, FILE_NAME)}, {"metadata": dict_of(text(200), ANY)}))
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def is_index(path: str | Path) -> bool:
    return Path(path).name.endswith(SUFFIX)


def read_index(path: Path, remedy: str = "download it again") -> dict[str, str]:
    """Tensor name -> file name of an index. Raises ``UserError``; a file name is never a path."""
    found: dict[str, str] = read_json(path, _SCHEMA, remedy, MOST_BYTES)["weight_map"]
    return found


def read_parts(path: Path) -> dict[str, Tensor]:
    """All tensors of an index's files, on the CPU, in the files' types. Raises ``UserError``."""
    index = read_index(path)
    tensors: dict[str, Tensor] = {}
    for file in _files(path, index):
        _, entries = read_header(file)
        recorded = {name for name, where in index.items() if where == file.name}
        if differ := sorted(recorded ^ set(entries)):
            raise UserError(
                f"{file} does not hold the tensors that {path.name} records (the first that differs: {differ[0]:.80}): "
                "download both again"
            )
        with open_tensors(file) as f:
            tensors |= {name: f.get_tensor(name) for name in entries}
    return tensors


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of a weights file; of an index, of the lines "NAME SHA256" of its files in the order of their names."""
    path = Path(path)
    if not is_index(path):
        return sha256(path)
    lines = [f"{file.name} {sha256(file)}\n" for file in _files(path, read_index(path))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_whole(path: Path) -> None:
    """Raise ``UserError`` for a file that is one of several."""
    if (found := _PART.fullmatch(path.name)) and int(found[2]) > 1:
        raise UserError(
            f"{path} is one of {int(found[2])} files of a network: name {path.with_name(found[1] + SUFFIX)}, with all of them "
            "beside it"
        )


def _files(path: Path, index: dict[str, str]) -> list[Path]:
    files = [path.with_name(name) for name in sorted(set(index.values()))]
    if not files:
        raise UserError(f"{path} names no weights: download it again")
    if lacking := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{lacking[0]} does not exist, although {path.name} names it ({len(lacking)} of {len(files)} files are missing): "
            "download it into the same folder"
        )
    return files
