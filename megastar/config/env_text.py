"""Environment variables in a configuration: used by value, recorded by name."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from megastar.config import yaml_text
from megastar.config.yaml_text import YamlError, map_values

ENV = "oc.env:"


class EnvText(str):
    """A string that contains environment variables; ``expression``, which names them, is recorded in its place."""

    expression: str

    def __new__(cls, value: str, expression: str = "") -> EnvText:
        text = super().__new__(cls, value)
        text.expression = expression
        return text


def recorded(tree: Any) -> Any:
    """``dataclasses.asdict`` of a configuration, with expressions in place of environment variables."""
    return map_values(lambda value: value.expression if isinstance(value, EnvText) else value, tree)


def resolve(tree: Any, lenient: bool = False) -> Any:
    """``tree`` with its ``${...}`` resolved; ``EnvText`` where environment variables are used.

    With ``lenient`` an unset variable leaves the expression. Raises ``YamlError``.
    """
    if not any("${" in text for text in _strings(tree)):
        return tree
    values = marked = None
    try:
        values = yaml_text.resolve(tree)
    except YamlError:
        if not lenient:
            raise
    try:
        with _marking():
            marked = yaml_text.resolve(tree)
    except YamlError as error:
        if values is None:
            raise
        raise YamlError("an environment variable cannot be the name of a field: write the name") from error
    return _env_texts(marked if values is None else values, marked)


def keep_expressions(cfg: Any, config: DictConfig, data: dict[str, Any]) -> None:
    """Set ``EnvText`` in the strings of ``cfg``, made from ``config``, that contain environment variables.

    ``config`` was filled from ``data``, which holds ``EnvText``, and expressions that are resolved in ``config`` only.
    """
    if not any("${" in text or isinstance(text, EnvText) for text in _strings(data)):
        return
    marked = copy.deepcopy(config)
    for name, text in yaml_text.leaves(data):
        if isinstance(text, EnvText):
            with suppress(OmegaConfBaseException):  # of a number
                OmegaConf.update(marked, name, _mark_of(text.expression))
    with _marking():
        _set_expressions(cfg, marked)


def _set_expressions(section: Any, marked: Any) -> None:
    if isinstance(section, list):
        pairs: list[tuple[Any, Any]] = list(enumerate(section))
    else:
        pairs = list((section if isinstance(section, dict) else vars(section)).items())
    for key, value in pairs:
        try:
            text = marked[key]
        except (OmegaConfBaseException, KeyError, IndexError):
            continue
        if isinstance(value, (dict, list)) or is_dataclass(value):
            _set_expressions(value, text)
        elif isinstance(value, str) and isinstance(text, str) and _MARK.search(text):
            put = section.__setitem__ if isinstance(section, (dict, list)) else section.__setattr__
            put(key, EnvText(value, _expanded(text)))


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def _env_texts(value: Any, marked: Any) -> Any:
    if isinstance(value, dict) and isinstance(marked, dict) and value.keys() == marked.keys():
        return {key: _env_texts(inner, marked[key]) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(marked, list) and len(value) == len(marked):
        return [_env_texts(inner, m) for inner, m in zip(value, marked, strict=True)]
    if isinstance(value, (dict, list)):
        raise YamlError("an environment variable can be a single value only, not a list or a mapping")
    if value is not None and isinstance(marked, str) and _MARK.search(marked):
        expression = _expanded(marked)
        return EnvText(expression if value == marked else str(value), expression)
    return value


# Marks: what ``oc.env`` returns while they are made, so that they are found wherever the variable was used.
_MARK = re.compile("megastar_env_([0-9a-f]+)_")  # a word that other resolvers leave as it is
_SIMPLE = re.compile(r"[\w./:@%+-]+")
_marks: ContextVar[bool] = ContextVar("marks", default=False)


@contextmanager
def _marking() -> Iterator[None]:
    token = _marks.set(True)
    try:
        yield
    finally:
        _marks.reset(token)


def _mark_of(expression: str) -> str:
    return f"megastar_env_{expression.encode(errors='surrogatepass').hex()}_"


def _expanded(text: str) -> str:
    """``text`` with the expressions in place of their marks."""
    return _MARK.sub(lambda m: bytes.fromhex(m[1]).decode(errors="surrogatepass"), text)


def _env(*words: Any) -> Any:
    """The resolver ``oc.env``; marks contain the whole expression."""
    if not _marks.get():
        return yaml_text.hidden(oc.env(*words))
    plain = ["null" if word is None else str(word) for word in words]
    quoted = [w if _SIMPLE.fullmatch(w) else "'" + w.replace("'", "\\'") + "'" for w in plain]
    return _mark_of(f"${{{ENV}{_expanded(','.join(quoted))}}}")


with warnings.catch_warnings():  # newer versions have another name for it
    warnings.simplefilter("ignore")
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)
