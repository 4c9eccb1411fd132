"""The files of a folder in the Hub's layout, and the schemas of those that another program may have written. No torch.

config.json                      architecture, provenance, names and hashes of the weights files; of the tokenizer sha256, its
                                 identity (encoder and codebook), and file_sha256, of its whole file (older folders lack it)
model.safetensors                the weights; above 5 GB model-00001-of-00002.safetensors, ... and model.safetensors.index.json
tokenizer/config.json            architecture and provenance of the tokenizer
tokenizer/tokenizer.safetensors
preprocessor_config.json         how images become the tokenizer's input
README.md                        the model card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megastar.errors import UserError
from megastar.model.io import PROVENANCE
from megastar.run_dir.layout import CHECKPOINTS, MANIFEST
from megastar.utils.json_file import (
    ANY,
    FILE_NAME,
    SHA256,
    check,
    dict_of,
    integer,
    one_of,
    read_json,
    record,
    shown,
    text,
    validator,
)
from megastar.utils.weights import weight_parts

FORMAT, MODEL_TYPE = 1, "megastar"
CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
PREPROCESSOR, TOKENIZER, TOKENIZER_FILE = "preprocessor_config.json", "tokenizer", "tokenizer.safetensors"
HOLDS = (CONFIG, "model*.safetensors", INDEX, CARD, PREPROCESSOR, TOKENIZER)
SHARD_FORMAT = "megastar-model-shard"  # in the metadata of one of several weights files
SHARD_BYTES = 5 * 10**9
MOST_BYTES = 16 << 20  # of a JSON file
OTHERS = ("model_index.json", "adapter_config.json", "tokenizer_config.json", "pytorch_model.bin")  # of other libraries

_FILE = record({"bytes": integer(), "sha256": SHA256})
_CONFIG = validator(
    record(
        {"model_type": one_of(MODEL_TYPE), "megastar_format": integer(1), "model": dict_of(text(200), ANY),
         "provenance": PROVENANCE, "weights": dict_of(FILE_NAME, _FILE)},
        {"tokenizer": record({"sha256": SHA256}, {"file_sha256": SHA256})},
    )
)  # fmt: skip


def is_hub_folder(path: Path) -> bool:
    """Whether ``path`` is a folder of weights in this layout, of any library, and no run or checkpoint."""
    if not path.is_dir() or (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir():
        return False
    return any((path / name).is_file() for name in (CONFIG, *OTHERS))


def read_config(path: Path, where: object = "") -> dict[str, Any]:
    """config.json of the folder ``path``. ``where``: its name in messages. Raises ``UserError``, also for a folder of
    another library's model."""
    file, what = path / CONFIG, where or path
    if not file.is_file():
        found = next((name for name in OTHERS if (path / name).is_file()), "")
        if found == "model_index.json":
            raise _foreign(what, "a pipeline of diffusers")
        raise UserError(
            f"{what} has no {CONFIG}{f', but {found}' if found else ''}: name a folder that megastar convert --to hf wrote"
        )
    content = read_json(file, None, "", MOST_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it is not an object: copy or download the folder again")
    if content.get("model_type") != MODEL_TYPE:
        raise _foreign(what, _library_of(content))
    version = content.get("megastar_format")
    if type(version) is int and version > FORMAT:
        raise UserError(f"{what} has format {version}, written by a newer megastar: update megastar")
    check(content, file, _CONFIG, "copy or convert it again")
    files = content["weights"]
    if not files or not all(name.endswith(".safetensors") for name in files):
        named = ", ".join(list(files)[:3]) or "no file"
        raise UserError(f"{file}: weights names {named}: only .safetensors files are read; convert the weights again")
    return content


def _library_of(content: dict[str, Any]) -> str:
    """Whose model a config.json describes."""
    kind, architectures = content.get("model_type"), content.get("architectures")
    if isinstance(name := content.get("_class_name"), str):
        return f"a model of diffusers ({shown(name)})"
    if isinstance(kind, str):
        first = architectures[0] if isinstance(architectures, list) and architectures else ""
        return (
            f"a model of transformers ({shown(kind)}{f', {shown(first)}' if isinstance(first, str) and first else ''})"
        )
    return "a model of another library"


def _foreign(what: object, library: str) -> UserError:
    return UserError(
        f"{what} holds {library}, not one of megastar: name a folder that megastar convert --to hf wrote, or LlamaGen's .pt "
        "file"
    )


def read_index(path: Path) -> dict[str, str]:
    """Weight -> file of a folder with several weights files. Raises ``UserError``; a name is never a path."""
    return weight_parts.read_index(path / INDEX, "copy or convert it again")
