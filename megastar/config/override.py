"""An override, ``section.field=value``: its value is read by the type of its field."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megastar.config.convert import shown
from megastar.config.env_text import ENV, resolve
from megastar.config.rules.problem import Problem
from megastar.config.yaml_text import YamlError, parse_text, parse_texts, parse_value

OF_FIELDS = re.compile(r"\$\{(?!\s*oc\.)")  # an expression that is resolved in the whole configuration


def set_override(data: dict[str, Any], text: str, schema: type, problems: list[Problem]) -> None:
    """Set the field that ``text`` names in ``data``, the sections of the dataclass ``schema``, or add to ``problems``."""
    name, equals, raw = text.partition("=")
    if not equals or not name or not all(name.split(".")):
        problems.append(Problem(f"override {shown(text)} is not of the form section.field=value", ()))
        return
    try:
        value = parse_as(type_of(schema, name), raw)
        if ENV in raw and not OF_FIELDS.search(raw):
            value = resolve({name: value})[name]
    except YamlError as error:
        problems.append(Problem(f"override {shown(text)} cannot be read ({error})", (name,)))
        return
    *parents, last = name.split(".")
    if parents and last == "base":
        section = ".".join(parents)
        problems.append(Problem(f"override {shown(text)}: give {section}=FILE, then {section}.field=value", (section,)))
        return
    node = data
    for parent in parents:
        inner = node.get(parent)
        node[parent] = node = inner if isinstance(inner, dict) else {}
    node[last] = value


def type_of(schema: type, name: str) -> Any:
    """The type of the field with this dotted name in the dataclass ``schema``; None for an unknown one, ``Path`` for
    ``method``, which names a file and is no field."""
    hint: Any = schema
    for part in name.split("."):
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif is_dataclass(hint) and isinstance(hint, type):
            hint = get_type_hints(hint).get(part, Path if part == "method" else None)
        else:
            return None
    return hint


def parse_as(hint: Any, raw: str) -> Any:
    """``raw`` as YAML, except that text stays as it is typed: 007, 1e-4, null, yes, ``a: b`` and ``run #2`` too.

    A section takes a mapping or the path of a file; null or nothing leaves it as it is. Raises ``YamlError``.
    """
    if hint is str:
        return parse_text(raw)
    if get_origin(hint) is list and get_args(hint)[0] is str:
        return parse_texts(raw)
    if hint is not Path and not is_dataclass(hint):
        return parse_value(raw)
    try:
        value = parse_value(raw)
    except YamlError:  # not YAML, but it can be the path of a file
        return parse_text(raw)
    return parse_text(raw) if isinstance(value, str) or os.path.isfile(raw.strip()) else value


def names_of(schema: type, prefix: str = "") -> list[str]:
    """The dotted names of all fields of the dataclass ``schema``, in its order; sections before their fields."""
    names = []
    for field, hint in get_type_hints(schema).items():
        names.append(prefix + field)
        if is_dataclass(hint):
            names += names_of(hint, f"{prefix}{field}.")  # type: ignore[arg-type]
    return names


def choices_of(schema: type, name: str) -> list[str]:
    """The values that the field with this dotted name can have; none where it is not one of a few words."""
    section, _, last = name.rpartition(".")
    owner = type_of(schema, section) if section else schema
    if not is_dataclass(owner):
        return []
    found = [f for f in fields(owner) if f.name == last]
    if found and type_of(schema, name) is bool:
        return ["true", "false"]
    return [str(c) for f in found for c in f.metadata.get("choices", ())]
