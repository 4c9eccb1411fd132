"""``megastar.json``, the manifest of a checkpoint: its schema and checks.

The manifest is checked once, here. Fields of newer versions are kept; a manifest of another format is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megastar.config.from_file import check_section
from megastar.config.load import config_from_dict
from megastar.config.schema import ModelConfig, RunConfig
from megastar.errors import UserError
from megastar.run_dir.layout import FORMAT, MANIFEST
from megastar.utils.files import open_regular
from megastar.utils.json_file import (
    ANY,
    FILE_NAME,
    FLOAT,
    MAX_INT,
    SHA256,
    WEIGHT_NAME,
    Schema,
    check,
    core,
    dict_of,
    integer,
    list_of,
    one_of,
    optional,
    read_json,
    record,
    shown,
    text,
    validator,
)

_MESH = record({"data": integer(1, 1 << 20), "tensor": integer(1, 4096)}, {"zero_stage": integer(0, 3)})
_SHAPE = list_of(integer(0, 1 << 40), high=8)
_FILE = record({"bytes": integer(0, 1 << 50), "sha256": SHA256, "whose": text(500)})
_NEEDED: dict[str, Schema] = {  # to read the weights
    "optimizer_step": integer(),
    "mesh": _MESH,
    "parameters": core.dict_schema(WEIGHT_NAME, _SHAPE, min_length=1, max_length=100_000, strict=True),
    "config": dict_of(text(200), ANY),
}
_OTHERS: dict[str, Schema] = {
    "optimizer": one_of("adamw", "muon"),  # optim.name
    "steps": optional(integer()),
    "dtype": text(100),
    "classes": optional(list_of(text(10_000))),
    "command": optional(text()),
    "val_loss_ar": optional(FLOAT),
    "guard": record(
        {},
        {
            "losses": list_of(FLOAT),
            "skips": list_of(integer()),
            "rollbacks": integer(0, 1_000_000),
            "offset": integer(-MAX_INT),
        },
    ),
    "data": text(200),
    "val_data": text(200),
    "tokenizer": text(200),  # SHA-256 of what determines the codes (tokenizer/io.py), or empty
    "tokenizer_file": text(10_000),  # where the run found it
    "downsample": integer(0, 1 << 16),  # pixels per token and side; 0: not known
    "order": integer(0, 100),
    "init": optional(dict_of(text(200), ANY)),
    "converted": record({"from": text(10_000), "mesh": _MESH}),
}
# A step has as many digits as the name of the folder.
_HEAD = {"format": integer(FORMAT, FORMAT), "step": integer(0, 99_999_999), "files": dict_of(FILE_NAME, _FILE)}
_SCHEMA = validator(record(_HEAD, _NEEDED | _OTHERS))
_COMPLETE = validator(record(_NEEDED))


class OtherFormat(UserError):
    """A manifest that another version of megastar wrote."""


def load(checkpoint: Path) -> dict[str, Any]:
    """The manifest of ``checkpoint``, checked. Raises ``UserError``."""
    path = checkpoint / MANIFEST
    manifest = read_json(path)
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        version = shown(manifest["format"])
        raise OtherFormat(f"{path} has format {version}, this megastar reads {FORMAT}: use the version that wrote it")
    content: dict[str, Any] = check(manifest, path, _SCHEMA)
    return content


def require_weights(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raise ``UserError`` for a manifest without the fields that are needed to read the weights."""
    check(manifest, checkpoint / MANIFEST, _COMPLETE, "restore it")


def optimizer_of(manifest: dict[str, Any]) -> str:
    """The optimizer that wrote a checkpoint; before there was a choice, AdamW."""
    return str(manifest.get("optimizer", "adamw"))


def check_files(checkpoint: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Raise ``UserError`` unless the files of a checkpoint (all, or ``names``) exist with the manifest's sizes."""
    for name in manifest["files"] if names is None else names:
        entry = manifest["files"][name]
        if found := file_problem(checkpoint / name, entry["bytes"]):
            missing = f"{checkpoint} lacks {name} ({shown(entry['whose'])})"
            raise UserError(missing if found == "is missing" else f"{checkpoint / name} {found}")


def file_problem(path: Path, size: int) -> str:
    """The problem with a file of a checkpoint, apart from its content, or the empty string."""
    try:
        if path.is_symlink() and path.parent.resolve() not in path.resolve().parents:
            return "is a link to a file outside the checkpoint: copy the file there"
        with open_regular(path) as f:
            found = os.fstat(f.fileno()).st_size
    except (FileNotFoundError, RuntimeError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UserError:
        return "is not a regular file"
    return "" if found == size else f"is damaged: it has {found} bytes, its manifest records {size}"


def config_of(checkpoint: Path, manifest: dict[str, Any]) -> RunConfig:
    """The configuration in a manifest, which may not refer to other files as a YAML file may. Raises ``UserError``."""
    require_weights(checkpoint, manifest)
    path, data = checkpoint / MANIFEST, manifest["config"]
    for name, section in data.items():
        if (
            name == "method"
            or (isinstance(section, dict) and "base" in section)
            or (name == "model") > isinstance(section, dict)
        ):
            raise UserError(
                f"{path} is damaged: config.{shown(name)} is {shown(section)}, not a section of fields: restore it"
            )
    check_section(ModelConfig, data.get("model", {}), f"{path}: config.model")
    try:
        return config_from_dict(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
