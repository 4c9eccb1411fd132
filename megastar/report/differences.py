"""The fields in which configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megastar.config.load import flatten

ABSENT = "not set"


class Difference(NamedTuple):
    name: str  # dotted
    baseline: str
    values: list[str]  # of each run
    changed: list[bool]  # whether the value differs from the baseline


def differences(baseline: Mapping[str, Any], configs: Sequence[Mapping[str, Any] | None]) -> list[Difference]:
    """The fields (except ``run``) in which a run differs from the baseline, in the baseline's order.

    A run without a configuration (None) has no values and no differences.
    """
    base = flatten(baseline)
    flat = [None if c is None else flatten(c) for c in configs]
    out = []
    for name in dict.fromkeys([*base, *(key for c in flat if c for key in c)]):
        if name == "run":
            continue
        expected = base.get(name, ABSENT)
        changed = [c is not None and c.get(name, ABSENT) != expected for c in flat]
        if any(changed):
            values = ["" if c is None else text(c.get(name, ABSENT)) for c in flat]
            out.append(Difference(name, text(expected), values, changed))
    return out


def text(value: Any) -> str:
    """A value as in YAML: true, 1e-4, "" for an empty string."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)
