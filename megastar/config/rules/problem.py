"""What a rule reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One sentence, and the dotted fields that it concerns. Rules about these are not checked further."""

    text: str
    fields: tuple[str, ...]


def divisors(n: int) -> list[int]:
    """All divisors, or for a huge ``n`` those below a million and their quotients."""
    small = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def words(values: list[Any]) -> str:
    """1, 2 or 4"""
    shown = [str(v) for v in values] or ["other values"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def near(values: list[int], wanted: int, count: int = 4) -> list[int]:
    """The few values nearest to the wanted one."""
    return sorted(sorted(values, key=lambda v: abs(v - wanted))[:count])
