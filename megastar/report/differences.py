"""What a run's configuration has that another one's has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ABSENT = "not there"


class Difference(NamedTuple):
    name: str  # dotted
    baseline: str
    values: list[str]  # of each run, in order
    changed: list[bool]  # whether it differs from the baseline's


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flatten(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return out


def differences(baseline: Mapping[str, Any], configs: Sequence[Mapping[str, Any] | None]) -> list[Difference]:
    """The fields in which some run differs from the baseline, in the baseline's order; all are nested mappings.

    A run without a configuration (None) has no values and no differences. The run's folder is no difference.
    """
    base = flatten(baseline)
    flat = [None if c is None else flatten(c) for c in configs]
    out = []
    for name in dict.fromkeys([*base, *(key for c in flat if c for key in c)]):
        if name == "run":
            continue
        there = [None if c is None else c.get(name, ABSENT) for c in flat]
        own = base.get(name, ABSENT)
        changed = [c is not None and value != own for c, value in zip(flat, there, strict=True)]
        if any(changed):
            values = ["" if c is None else text(v) for c, v in zip(flat, there, strict=True)]
            out.append(Difference(name, text(own), values, changed))
    return out


def text(value: Any) -> str:
    """As it stands in YAML: true, 1e-4, "" for an empty text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)
