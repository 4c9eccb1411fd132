"""probe.png and score.png, of the first weights in ``cfg.weights``; a figure without data is not drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastar.evaluation.figure import Curve, draw_lines
from megastar.experiments.results import HIGHER, Results


def draw_probe(results: Results, path: Path, majority: Mapping[str, Any] | None) -> None:
    """Accuracy by position, and the accuracy of always predicting the most frequent class."""
    c, weights = results.cfg, results.cfg.weights[0]
    lines = []
    for variant, v in c.variants.items():
        probes = list(results.of(variant, lambda r: r["weights"][weights]["probe"]).values())
        if probes:
            ys = [[100 * a for a in p["accuracy"]] for p in probes]
            lines.append(Curve(results.labels[variant], probes[0]["positions"], ys, thin=v.kind == "ablation"))
    if lines:
        level = ("most frequent class", 100 * majority["accuracy"]) if majority else None
        title = f"linear probe of block {c.probe.block}, null class, {c.probe.score_on} split, {weights} weights"
        labels = "position in the sequence", "top-1 accuracy (%)"
        draw_lines(lines, path, *labels, title, ticks=lines[0].xs, level=level)


def draw_score(results: Results, path: Path) -> None:
    """The first score of checkpoints by the number of images they were trained on."""
    c, weights, split = results.cfg, results.cfg.weights[0], results.cfg.score.against[0]
    lines, metric = [], ""
    for variant, v in c.variants.items():
        curves = [curve for curve in results.of(variant, lambda r: r["curve"]).values() if curve]
        steps = sorted({int(s) for curve in curves for s in curve if "score" in curve[s]})
        if steps:
            batch = next(iter(results.of(variant, lambda r: r["images"] // r["steps"]).values()))
            images = [s * batch for s in steps]
            ys = [[value_at(curve, s, split) for s in steps] for curve in curves]
            lines.append(Curve(results.labels[variant], images, ys, thin=v.kind == "ablation"))
            metric = next(r["score"][split]["metric"] for curve in curves for r in curve.values() if "score" in r)
    if lines:
        better = "higher" if metric.startswith(HIGHER) else "lower"
        title = f"{c.curve.count} images against the {split} split, {weights} weights"
        ticks = lines[0].xs if len(lines[0].xs) < 9 else None
        draw_lines(lines, path, "images seen", f"{metric} ({better} is better)", title, ticks=ticks)


def value_at(curve: Mapping[str, Any], step: int, split: str) -> float:
    """NaN if not measured yet."""
    try:
        return float(curve[str(step)]["score"][split]["value"])
    except KeyError:
        return math.nan
