"""The rules of ``trackers`` and ``train.profile``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megastar.config.rules.problem import Problem
from megastar.config.schema import TrainConfig


def tracker_problems(names: list[str], field: str) -> Iterator[Problem]:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        yield Problem(f"{field} = {names}: {twice[0]} is given twice: leave one out", (field,))


def profile_problems(t: TrainConfig) -> Iterator[Problem]:
    p, here = t.profile, "train.profile."
    if not p.steps:
        return
    if not p.ranks:
        yield Problem(
            f"{here}ranks is empty: name the ranks to profile, as [0], or set {here}steps to 0", (here + "ranks",)
        )
    if t.steps and p.start + p.steps > t.steps:
        yield Problem(
            f"{here}start = {p.start}: the {p.steps} profiled steps after it end beyond train.steps {t.steps}: lower "
            f"start to at most {max(0, t.steps - p.steps)}",
            (here + "start", here + "steps", "train.steps"),
        )
