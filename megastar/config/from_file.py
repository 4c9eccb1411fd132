"""A section of the configuration in a weights file or a manifest: types and bounds, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic_core import SchemaValidator

from megastar.errors import UserError
from megastar.utils.json_file import BOOL, Schema, check, core, list_of, record, shown, text, validator

MAX = 2**31 - 1  # of an integer whose field has no bound of its own
LIMITS = {"image_size": 8192, "image_tokens": 1 << 16, "n_layer": 10_000, "res_blocks": 1000}
MAX_LEVELS = 16


def check_section(section: type, data: Any, where: str) -> dict[str, Any]:
    """``data`` as arguments of the dataclass ``section``; missing fields take their defaults.

    Raises ``UserError`` for a field of another type or out of its bounds, and for an unknown field: a network that is
    built without it would be a different one.
    """
    checked: dict[str, Any] = check(data, where, _validator(section), "copy or convert the file again")
    unknown = sorted(set(checked) - {f.name for f in fields(section)})
    if unknown:
        names = ", ".join(shown(name) for name in unknown[:5])
        raise UserError(f"{where}: unknown fields {names}, written by a newer megastar; update megastar")
    return checked


@cache
def _validator(section: type) -> SchemaValidator:
    hints = get_type_hints(section)
    return validator(
        record(
            {},
            {f.name: _schema(hints[f.name], {"high": LIMITS.get(f.name, MAX), **f.metadata}) for f in fields(section)},
        )
    )


def _schema(hint: Any, bounds: Mapping[str, Any]) -> Schema:
    low, high = bounds.get("low"), bounds["high"]
    if get_origin(hint) is list:
        return list_of(_schema(get_args(hint)[0], bounds), bounds.get("fewest", 1), MAX_LEVELS)
    if hint is int:
        return core.int_schema(strict=True, ge=low, le=high)
    if hint is float:
        limits = {"ge": low, "le": high, "gt": bounds.get("above"), "lt": bounds.get("below")}
        return core.float_schema(strict=True, allow_inf_nan=False, **limits)
    if hint is bool:
        return BOOL
    assert hint is str, hint
    return core.literal_schema(list(bounds["choices"])) if "choices" in bounds else text(1000)
