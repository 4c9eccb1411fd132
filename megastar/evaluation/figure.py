"""Figures: one line a model, with the band and the dots of its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastar.errors import UserError


@dataclass(frozen=True)
class Line:
    """``ys``: one list a seed, each as long as ``xs``; NaN where nothing was measured."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Sequence[float]]
    thin: bool = False


def draw_probes(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Accuracy over position (figure 4 of the ST-AR paper). ``results``: name -> what ``linear_probe`` returned."""
    lines = [Line(name, r["positions"], [[100 * a for a in r["accuracy"]]]) for name, r in results.items()]
    blocks = sorted({r["block"] for r in results.values()})
    title = f"linear probe of block {', '.join(map(str, blocks))}, null class"
    ticks = sorted({p for r in results.values() for p in r["positions"]})
    draw_lines(lines, path, "position in the sequence", "top-1 accuracy (%)", title, ticks=ticks)


def draw_lines(
    lines: Sequence[Line], path: str | Path, x: str, y: str, title: str, *, ticks: Sequence[float] | None = None
) -> None:
    """A PNG: the mean over seeds as a line, their standard deviation as a band, each seed as dots.

    Raises ``UserError`` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"a figure needs matplotlib ({error}): pip install 'megastar[eval]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        ys = np.asarray(line.ys, float)  # (seeds, points)
        known = (~np.isnan(ys)).sum(0)
        xs, ys = np.asarray(line.xs, float)[known > 0], ys[:, known > 0]
        mean = np.nanmean(ys, 0)
        style = {"linewidth": 1.0, "linestyle": "--"} if line.thin else {"linewidth": 2.0}
        many = len(ys) > 1
        (drawn,) = axes.plot(xs, mean, marker="" if many else "o", markersize=4, label=line.label, **style)
        if many:
            for one in ys:
                axes.plot(xs, one, ".", color=drawn.get_color(), markersize=4, alpha=0.6)
            half = np.where(known[known > 0] > 1, np.nanstd(ys, 0) * np.sqrt(len(ys) / (len(ys) - 1)), 0.0)
            axes.fill_between(xs, mean - half, mean + half, color=drawn.get_color(), alpha=0.15, linewidth=0)
    if ticks is not None:
        axes.set_xticks(list(ticks))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
