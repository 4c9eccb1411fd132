"""Finding files that a configuration names, and reading YAML. No torch."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megastar.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
_ENV, _MARKED, _MARK = "oc.env:", "megastar.env", re.compile("megastar_env_([0-9a-f]+)_")
INSTALLED = Path(sys.prefix) / "share" / "megastar"  # setup.py puts configs/ there


def find_file(name: str | Path, near: Path | None = None) -> Path | None:
    """The file ``name`` below the working directory, a parent of ``near``, the repository, or the installed configs.

    Returns the first that exists, or None.
    """
    path = Path(name).expanduser()
    for root in [Path(), *(near.resolve().parents if near else ()), REPOSITORY, INSTALLED]:
        if (root / path).is_file():
            return root / path
    return None


def require_file(name: str | Path, what: str, near: Path | None = None) -> Path:
    """``find_file`` or a ``UserError`` that suggests the file with the nearest name."""
    found = find_file(name, near)
    if found is not None:
        return found
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder: name a file in it")
    roots = [Path(), *([near.parent] if near else []), REPOSITORY, INSTALLED]
    folders = [root / path.parent for root in roots if (root / path.parent).is_dir()]
    beside = [p.name for folder in folders for p in sorted(folder.iterdir()) if p.suffix == path.suffix]
    close = difflib.get_close_matches(path.name, beside, 1, 0.5)
    hint = f"did you mean {path.parent / close[0]}?" if close else "check the path"
    raise UserError(f"{what} {path} does not exist: {hint}")


class EnvText(str):
    """A string that contains environment variables; ``expression``, which names them, is recorded in its place."""

    expression: str

    def __new__(cls, value: str, expression: str = "") -> EnvText:
        text = super().__new__(cls, value)
        text.expression = expression
        return text


def recorded(tree: Any) -> Any:
    """``dataclasses.asdict`` of a configuration, with expressions in the place of environment variables."""
    if isinstance(tree, dict):
        return {key: recorded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [recorded(value) for value in tree]
    return tree.expression if isinstance(tree, EnvText) else tree


def resolve(config: Any, lenient: bool = False) -> Any:
    """A config or dict as plain values, ``${...}`` resolved; ``EnvText`` where environment variables are used.

    With ``lenient`` an unset variable leaves the expression. Raises ``OmegaConfBaseException``.
    """
    raw = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    if not any(_ENV in text for text in _strings(raw)):
        return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    marked = OmegaConf.to_container(OmegaConf.create(_with_marks(raw)), resolve=True)
    try:
        values = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except OmegaConfBaseException:
        if not lenient:
            raise
        values = marked
    return _env_texts(values, marked)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def _with_marks(tree: Any) -> Any:
    """``tree`` with the resolver ``megastar.env``, which returns a mark that contains the expression."""
    if isinstance(tree, dict):
        return {key: _with_marks(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_marks(value) for value in tree]
    return tree.replace(_ENV, f"{_MARKED}:") if isinstance(tree, str) else tree


def _env_texts(value: Any, marked: Any) -> Any:
    if isinstance(value, dict):
        return {key: _env_texts(inner, marked[key]) for key, inner in value.items()}
    if isinstance(value, list):
        return [_env_texts(inner, m) for inner, m in zip(value, marked, strict=True)]
    if isinstance(value, str) and isinstance(marked, str) and _MARK.search(marked):
        expression = _MARK.sub(lambda m: f"${{{bytes.fromhex(m[1]).decode()}}}", marked)
        return EnvText(expression if value == marked else value, expression)
    return value


def _mark(*words: Any) -> str:
    expression = _ENV + ",".join("null" if word is None else str(word) for word in words)
    return f"megastar_env_{expression.encode().hex()}_"  # a word that other resolvers leave as it is


with warnings.catch_warnings():  # newer versions have another name for it
    warnings.simplefilter("ignore")
    OmegaConf.register_new_resolver(_MARKED, _mark, replace=True)


def read_yaml(path: Path, lenient: bool = False) -> dict[str, Any]:
    """A YAML file as a dict, ``${...}`` resolved as ``resolve`` does. Raises ``UserError`` if it is not a mapping of
    sections."""
    try:
        loaded = OmegaConf.load(path)
        data = as_written(resolve(loaded, lenient), path.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not YAML ({getattr(error, 'problem', None) or error})") from error
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} contains a list instead of sections of `field: value`")
    return {str(k): v for k, v in data.items()}


def as_written(value: Any, text: str) -> Any:
    """``value``, read from the YAML ``text``, where words such as ``off``, booleans in YAML 1.1, are strings."""

    def visit(value: Any, node: yaml.Node | None) -> Any:
        if isinstance(value, dict) and isinstance(node, yaml.MappingNode):
            nodes = {key.value: inner for key, inner in node.value}
            return {key: visit(inner, nodes.get(str(key))) for key, inner in value.items()}
        if isinstance(value, bool) and isinstance(node, yaml.ScalarNode) and node.tag.endswith(":bool"):
            return value if node.value.lower() in ("true", "false") else node.value
        return value

    return visit(value, yaml.compose(text, Loader=yaml.SafeLoader))
