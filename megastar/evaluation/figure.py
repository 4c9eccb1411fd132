"""The linear probe as a picture: accuracy over position, one line a model (figure 4 of the ST-AR paper)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastar.errors import UserError


def draw_probes(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """``results``: name -> what ``linear_probe`` returned. Writes a PNG. Raises ``UserError`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"a figure needs matplotlib ({error}): pip install 'megastar[eval]'") from error
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        axes.plot(result["positions"], [100 * a for a in result["accuracy"]], marker="o", label=name)
    axes.set_xticks(sorted({p for r in results.values() for p in r["positions"]}))
    blocks = sorted({r["block"] for r in results.values()})
    axes.set_xlabel("position in the sequence")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(f"linear probe of block {', '.join(map(str, blocks))}, null class")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
