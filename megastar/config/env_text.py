"""Environment variables in a configuration: used by value, recorded by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from megastar.config import yaml_text
from megastar.config.yaml_text import YamlError

ENV = "oc.env:"
_MARKED, _MARK = "megastar.env", re.compile("megastar_env_([0-9a-f]+)_")


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


def resolve(tree: Any, lenient: bool = False) -> Any:
    """``tree`` with its ``${...}`` resolved; ``EnvText`` where environment variables are used.

    With ``lenient`` an unset variable leaves the expression. Raises ``YamlError``.
    """
    if not any(ENV in text for text in _strings(tree)):
        return yaml_text.resolve(tree)
    marked = yaml_text.resolve(_with_marks(tree))
    try:
        values = yaml_text.resolve(tree)
    except YamlError:
        if not lenient:
            raise
        values = marked
    return _env_texts(values, marked)


def keep_expressions(section: Any, data: dict[str, Any]) -> None:
    """Set the ``EnvText`` of ``data`` in the fields of ``section``, which OmegaConf made plain strings."""
    for key, value in data.items():
        inner = section.get(key) if isinstance(section, dict) else getattr(section, str(key), None)
        if isinstance(value, dict) and inner is not None:
            keep_expressions(inner, value)
        elif isinstance(value, EnvText) and inner == str(value) and not isinstance(section, dict):
            setattr(section, key, value)


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
    return tree.replace(ENV, f"{_MARKED}:") if isinstance(tree, str) else tree


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
    expression = ENV + ",".join("null" if word is None else str(word) for word in words)
    return f"megastar_env_{expression.encode().hex()}_"  # a word that other resolvers leave as it is


with warnings.catch_warnings():  # newer versions have another name for it
    warnings.simplefilter("ignore")
    OmegaConf.register_new_resolver(_MARKED, _mark, replace=True)
