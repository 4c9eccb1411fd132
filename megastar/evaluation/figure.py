"""Figures: one line per model, with a band over its seeds, labelled at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megastar.errors import UserError
from megastar.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinguishable for colour-blind readers, without yellow, which is unreadable on white.
BOLD = ("#0072B2", "#DE8F05", "#009E73", "#D55E00", "#000000")
THIN = ("#CC79A7", "#56B4E9", "#7F7F7F", "#8C6D31", "#5E4FA2")
MARKERS = "osD^vP"
DASHES = ((4, 2), (1.5, 1.5), (6, 2, 1.5, 2), (8, 2))


@dataclass(frozen=True)
class Curve:
    """``ys``: one list per seed, each as long as ``xs``; NaN where nothing was measured."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Sequence[float]]
    thin: bool = False


def require_matplotlib() -> None:
    """Raises ``UserError`` if it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"a figure needs matplotlib ({error}): pip install 'megastar[eval]'") from error


def draw_probes(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Accuracy over position (figure 4 of the ST-AR paper). ``results``: name -> what ``linear_probe`` returned."""
    lines = [Curve(name, r["positions"], [[100 * a for a in r["accuracy"]]]) for name, r in results.items()]
    blocks = sorted({r["block"] for r in results.values()})
    title = f"linear probe of block {', '.join(map(str, blocks))}, null class"
    ticks = sorted({p for r in results.values() for p in r["positions"]})
    draw_lines(lines, path, "position in the sequence", "top-1 accuracy (%)", title, ticks=ticks)


def mean_and_deviation(ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds (seeds, points) without NaN: (points,) each; the deviation (n - 1) of a single seed is 0."""
    count = (~np.isnan(ys)).sum(0)
    mean = np.nansum(ys, 0) / count
    return mean, np.sqrt(np.nansum((ys - mean) ** 2, 0) / np.maximum(count - 1, 1))


def draw_lines(
    lines: Sequence[Curve],
    path: str | Path,
    x: str,
    y: str,
    title: str,
    *,
    ticks: Sequence[float] | None = None,
    level: tuple[str, float] | None = None,
) -> None:
    """A PNG: the mean over seeds as a line, the standard deviation as a band, each seed as a faint line.

    ``level``: label and height of a dotted reference line. Raises ``UserError`` if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []  # of each line: end point, label and colour
    numbers = {True: 0, False: 0}
    for line in lines:
        number, numbers[line.thin] = numbers[line.thin], numbers[line.thin] + 1
        ys = np.asarray(line.ys, float)  # (seeds, points)
        seen = ~np.isnan(ys).all(0)
        xs, ys = np.asarray(line.xs, float)[seen], ys[:, seen]
        if not len(xs):
            continue
        mean, deviation = mean_and_deviation(ys)
        colours = THIN if line.thin else BOLD
        colour = colours[number % len(colours)]
        style: dict[str, Any] = {"linewidth": 2.4, "marker": MARKERS[number % len(MARKERS)], "markersize": 5.5}
        if line.thin:
            style = {"linewidth": 1.3, "dashes": DASHES[number % len(DASHES)]}
        axes.plot(xs, mean, color=colour, zorder=2 if line.thin else 3, **style)
        if len(ys) > 1:
            axes.fill_between(xs, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
            for seed in ys:
                axes.plot(xs, seed, color=colour, linewidth=0.7, alpha=0.45)
        ends.append((xs[-1], mean[-1], line.label, colour))
    if level is not None:
        axes.axhline(level[1], color="#555555", linewidth=1.2, linestyle=":")
    if ticks is not None:
        axes.set_xticks(list(ticks))
    if ends and max(end[0] for end in ends) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if any(len(line.ys) > 1 for line in lines):
        title += "\nthick: mean over seeds; band: standard deviation; faint: each seed"
    axes.set_title(title, fontsize=9.5, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    if level is not None:
        left = axes.get_xlim()[0]
        axes.annotate(level[0], (left, level[1]), (4, 4), textcoords="offset points", fontsize=8.5, color="#555555")
    name_ends(axes, ends)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each line's label to the right of its end, moved apart where labels would overlap; beside ends before the last."""
    last = max((end[0] for end in ends), default=0.0)
    for x, y, label, colour in ends:
        if x < last:
            axes.annotate(
                label, (x, y), (8, 0), textcoords="offset points", color=colour, fontsize=9.5, va="center",
                parse_math=False,
            )  # fmt: skip
    low, high = axes.get_ylim()
    gap = 0.06 * (high - low)
    ends = sorted((end for end in ends if end[0] == last), key=lambda end: end[1])
    places = spaced([end[1] for end in ends], gap)
    right = axes.get_xlim()[1]
    for (x, y, label, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            label, (x, y), (right, place), color=colour, fontsize=9.5, va="center", annotation_clip=False,
            parse_math=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as possible to be ``gap`` apart: adjacent ones form groups around their mean."""
    groups: list[list[float]] = []  # of adjacent heights

    def placed(group: Sequence[float]) -> list[float]:
        return [sum(group) / len(group) + gap * (i - (len(group) - 1) / 2) for i in range(len(group))]

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and placed(groups[-1])[0] - placed(groups[-2])[-1] < gap:
            last = groups.pop()
            groups[-1] += last
    return [height for group in groups for height in placed(group)]
