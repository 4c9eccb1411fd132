"""Every field of a configuration as text: name, default, meaning."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NamedTuple, cast, get_args, get_origin, get_type_hints


class Row(NamedTuple):
    name: str  # dotted; of a section: its name and a dot
    default: str
    help: str


def rows(schema: type, prefix: str = "") -> list[Row]:
    """One row per field; a section is a row of its own, followed by its fields."""
    hints = get_type_hints(schema)
    out = []
    for f in fields(schema):
        hint, name = hints[f.name], prefix + f.name
        if is_dataclass(hint):
            out.append(Row(name + ".", "", f.metadata["help"]))
            out += rows(cast(type, hint), name + ".")
        elif get_origin(hint) is dict:  # sections that the user names
            out.append(Row(f"{name}.NAME.", "", f.metadata["help"]))
            out += rows(get_args(hint)[1], f"{name}.NAME.")
        else:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            out.append(Row(name, _show(default), f.metadata["help"] + _bounds(f)))
    return out


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value).replace(" ", "")


def _bounds(f: Field[Any]) -> str:
    choices = f.metadata.get("choices")
    if choices and not all(str(c) in f.metadata["help"] for c in choices):
        return f" ({', '.join(map(str, choices))})"
    return ""


def fields_text(schema: type, width: int = 100) -> str:
    """The table that ``--help`` prints."""
    table = rows(schema)
    name_width = max(len(r.name) for r in table) + 2
    default_width = min(24, max(len(r.default) for r in table)) + 2
    indent = " " * (name_width + default_width + 2)
    lines = []
    for r in table:
        if r.name.endswith("."):
            lines += ["", f"  {r.name[:-1]}: {r.help}"]
            continue
        head = f"  {r.name:<{name_width}}{r.default:<{default_width}}"
        if len(r.default) >= default_width:  # a long path as default: the help goes on the next line
            lines.append(head.rstrip())
            head = indent
        wrapped = textwrap.wrap(r.help, max(30, width - len(indent)))
        lines.append(head + wrapped[0])
        lines += [indent + more for more in wrapped[1:]]
    return "\n".join(lines)
