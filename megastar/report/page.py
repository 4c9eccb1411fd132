"""The page: one HTML file with its style, scripts, numbers and pictures inside. It asks nothing of any network."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment
from PIL import Image

from megastar.report.charts import charts_for
from megastar.report.differences import Difference
from megastar.report.series import Column, hours, thin

POINTS = 16_000  # of one value over all runs: many runs get fewer points each
MOST_EVENTS = 200  # of one run
WIDEST = 1280  # pixels of an embedded picture
SCRIPTS = ("chart.js", "charts.js", "pictures.js", "page.js")


@dataclass
class Grid:
    """A sample grid of one step, as an address of the form data:..."""

    step: int
    source: str
    caption: str


@dataclass
class ReportRun:
    """What the page tells of one run. Texts are plain: the page escapes them."""

    name: str
    state: str = "unknown"
    why: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)  # label, text
    origin: list[tuple[str, str]] = field(default_factory=list)  # command, hosts, versions
    health: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be shown, and why
    columns: dict[str, Column] = field(default_factory=dict)
    global_batch: int | None = None
    chance: float | None = None  # of the contrastive accuracies
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] | None = None
    config_text: str = ""
    grids: list[Grid] = field(default_factory=list)
    attention: dict[str, Any] | None = None  # report.attention.masked_picture, with ``picture`` and ``about``
    reach: dict[str, Any] | None = None  # ``means``, ``heads`` (block, head), ``uniform``, ``about``


def page(runs: list[ReportRun], baseline: str, table: list[Difference], *, title: str, made: str) -> str:
    """The whole HTML. ``baseline`` names what ``table`` compares with; ``made`` says when and by what."""
    names = {name for run in runs for name in run.columns}
    points = max(100, min(1000, POINTS // max(1, len(runs))))
    data = {"groups": charts_for(names), "runs": [numbers(run, points) for run in runs]}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(read("page.html")).render(
        runs=runs,
        title=title,
        made=made,
        baseline=baseline,
        other=baseline not in [run.name for run in runs],
        table=table,
        charts=bool(names),
        grids=any(run.grids for run in runs),
        attention=any(run.attention for run in runs),
        reach=any(run.reach for run in runs),
        style=read("page.css"),
        script="\n".join(read(name) for name in SCRIPTS),
        data=as_json(data),
    )


def numbers(run: ReportRun, points: int) -> dict[str, Any]:
    """One run for the page's script."""
    return {
        "name": run.name,
        "batch": run.global_batch,
        "chance": run.chance,
        "hours": hours(run.columns),
        "values": {name: thin(column, points) for name, column in run.columns.items()},
        "events": shown_events(run.events),
        "grids": [vars(grid) for grid in run.grids],
        "attention": run.attention,
        "reach": run.reach,
    }


def shown_events(events: list[dict[str, Any]], most: int = MOST_EVENTS) -> list[dict[str, Any]]:
    """What is marked on the time axis: all if they are few, else the saves go first, then the oldest of the rest."""
    told = [e for e in events if type(e.get("step")) is int and e["step"] >= 0]
    if len(told) > most:
        rare = [e for e in told if e.get("event") != "saved"]
        told = rare[-most:]
    keys = ("step", "event", "text", "time", "host")
    return [{k: str(e[k])[:300] if k != "step" else e[k] for k in keys if k in e} for e in told]


def as_json(value: Any) -> str:
    """Strict JSON that no HTML parser can take for the end of a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: line separators are escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read(name: str) -> str:
    return resources.files("megastar.report").joinpath("web", name).read_text(encoding="utf-8")


def embedded(image: Image.Image, *, lossless: bool = False) -> str:
    """A picture as a data: address, WebP, at most ``WIDEST`` pixels wide."""
    image = image.convert("RGB")
    if image.width > WIDEST:
        size = (WIDEST, max(1, round(image.height * WIDEST / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, lossless=lossless, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
