"""Finding files that a configuration names, and reading YAML and other text. No torch."""

from __future__ import annotations

import difflib
import os.path
from pathlib import Path
from typing import Any, cast

from megastar.config.env_text import resolve
from megastar.config.yaml_text import MOST_BYTES, YamlError, parse_yaml
from megastar.errors import UserError
from megastar.utils.files import read_regular

MAX_YAML = 4 << 20  # bytes
REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_PATH = 4000
INSTALLED = Path(__file__).resolve().parents[1] / "shipped"  # setup.py puts configs/ and the shipped weights there


def find_file(name: str | Path, near: Path | None = None) -> Path | None:
    """The file ``name`` below the working directory, a parent of ``near``, the repository, or the installed configs.

    Returns the first that exists, or None.
    """
    path = Path(os.path.expanduser(name))
    for root in [Path(), *(near.resolve().parents if near else ()), REPOSITORY, INSTALLED]:
        if os.path.isfile(root / path):  # False also for an invalid name
            return root / path
    return None


def require_file(name: str | Path, what: str, near: Path | None = None) -> Path:
    """``find_file`` or a ``UserError`` that suggests the file with the nearest name."""
    found = find_file(name, near)
    if found is not None:
        return found
    path = Path(name)
    if os.path.isdir(path):
        raise UserError(f"{what} {path} is a folder: name a file in it")
    if os.path.exists(path):
        raise UserError(f"{what} {path} is a device or pipe: name a file")
    if len(str(name)) > LONGEST_PATH or "\0" in str(name):
        raise UserError(f"{what} {str(name)[:60]!r}... cannot be the path of a file: check it")
    roots = [Path(), *([near.parent] if near else []), REPOSITORY, INSTALLED]
    folders = [root / path.parent for root in roots if os.path.isdir(root / path.parent)]
    beside = [p.name for folder in folders for p in sorted(folder.glob("*")) if p.suffix == path.suffix][:1000]
    close = difflib.get_close_matches(path.name, beside, 1, 0.5)
    hint = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    raise UserError(f"{what} {path} does not exist: {hint}")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file. Raises ``UserError`` for one that is not UTF-8 text of at most ``most`` bytes."""
    data = read_regular(path, most)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text: save it as UTF-8") from error


def read_yaml(path: Path, lenient: bool = False) -> dict[str, Any]:
    """A YAML file as a dict, ``${...}`` resolved as ``resolve`` does. Raises ``UserError`` if it is not a mapping of sections."""
    text = read_text(path)
    try:
        data = parse_yaml(text)
        if data is None:
            return {}
        if isinstance(data, dict):
            return cast("dict[str, Any]", resolve(data, lenient))
    except YamlError as error:
        where = f" line {error.line}" if error.line else ""
        what = "is not YAML" if error.syntax else "cannot be read"
        raise UserError(f"{path}{where} {what} ({error})") from error
    kind = "a list" if isinstance(data, list) else "a single value"
    raise UserError(f"{path} contains {kind} instead of sections of `field: value`")
