"""Finding files that a configuration names, and reading YAML. No torch."""

from __future__ import annotations

import difflib
import io
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megastar.errors import UserError
from megastar.utils.files import read_regular

MAX_YAML = 4 << 20  # bytes
REPOSITORY = Path(__file__).resolve().parents[2]
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


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict, ``${...}`` resolved. Raises ``UserError`` if it is not a mapping of sections."""
    try:
        text = read_regular(path, MAX_YAML).decode()
        loaded = OmegaConf.load(io.StringIO(text))
        data = as_written(OmegaConf.to_container(loaded, resolve=True), text)
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
