"""The page: one HTML file with embedded style, scripts, numbers and images. It loads nothing from a network."""

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
from megastar.report.series import Column, thin, training_hours
from megastar.utils.printable import printable

POINTS = 16_000  # of one value over all runs, shared among them
MAX_EVENTS = 200  # of one run
MAX_WIDTH = 1280  # pixels of an embedded image
SCRIPTS = ("chart.js", "charts.js", "images.js", "page.js")
LIVE = "live.js"


@dataclass
class Grid:
    """A sample grid of one step; ``source``: a data: URL."""

    step: int
    source: str
    caption: str


@dataclass
class ReportRun:
    """What the page shows of one run. Texts are plain: the page escapes them."""

    name: str
    state: str = "unknown"
    why: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)  # label, text
    origin: list[tuple[str, str]] = field(default_factory=list)  # command, hosts, versions
    health: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be shown and why
    columns: dict[str, Column] = field(default_factory=dict)
    global_batch: int | None = None
    chance: float | None = None  # of the contrastive accuracies
    events: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] | None = None
    config_text: str = ""
    grids: list[Grid] = field(default_factory=list)
    attention: dict[str, Any] | None = None  # of report.attention.masked_attention, with ``image`` and ``caption``
    distances: dict[str, Any] | None = None  # ``means`` of blocks, ``heads`` of each, ``uniform``, ``caption``


def page(
    runs: list[ReportRun], baseline: str, table: list[Difference], *, title: str, made: str, version: str = ""
) -> str:
    """The HTML. ``baseline``: name of the configuration that ``table`` compares with; ``made``: time and command.

    ``version``: of a page that a server sends, which takes over newer versions by itself; empty for a file.
    """
    names = {name for run in runs for name in run.columns}
    points = max(100, min(1000, POINTS // max(1, len(runs))))
    data = {"groups": charts_for(names), "runs": [script_data(run, points) for run in runs]}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(read("page.html")).render(
        runs=runs,
        title=title,
        made=made,
        baseline=baseline,
        other=baseline not in [run.name for run in runs],
        table=table,
        charts=bool(names),
        grids=any(run.grids for run in runs),
        attention=any(run.attention for run in runs),
        distances=any(run.distances for run in runs),
        style=read("page.css"),
        version=version,
        script="\n".join(read(name) for name in (*SCRIPTS, *([LIVE] if version else []))),
        data=as_json(printable_texts(data)),
    )
    return printable(html)  # a name must not reorder the text around it


def script_data(run: ReportRun, points: int) -> dict[str, Any]:
    """The data of one run for the page's script."""
    return {
        "name": run.name,
        "batch": run.global_batch,
        "chance": run.chance,
        "hours": training_hours(run.columns),
        "values": {name: thin(column, points) for name, column in run.columns.items()},
        "events": shown_events(run.events),
        "grids": [vars(grid) for grid in run.grids],
        "attention": run.attention,
        "distances": run.distances,
    }


def shown_events(events: list[dict[str, Any]], most: int = MAX_EVENTS) -> list[dict[str, Any]]:
    """The events marked on the time axis: if there are too many, the newest ones other than "saved"."""
    shown = [e for e in events if type(e.get("step")) is int and e["step"] >= 0]
    if len(shown) > most:
        shown = [e for e in shown if e.get("event") != "saved"][-most:]
    keys = ("step", "event", "text", "time", "host")
    return [{k: str(e[k])[:300] if k != "step" else e[k] for k in keys if k in e} for e in shown]


def printable_texts(value: Any) -> Any:
    """``value`` with ``printable`` keys and texts, because the page's scripts show them."""
    if isinstance(value, dict):
        return {printable(str(k)): printable_texts(v) for k, v in value.items()}
    if isinstance(value, list):
        return [printable_texts(v) for v in value] if any(isinstance(v, (str, dict, list)) for v in value) else value
    return printable(value) if isinstance(value, str) else value


def as_json(value: Any) -> str:
    """Strict JSON that cannot end a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: line separators are escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read(name: str) -> str:
    return resources.files("megastar.report").joinpath("web", name).read_text(encoding="utf-8")


def embedded(image: Image.Image, *, lossless: bool = False) -> str:
    """An image as a data: URL, WebP, at most ``MAX_WIDTH`` pixels wide."""
    image = image.convert("RGB")
    if image.width > MAX_WIDTH:
        size = (MAX_WIDTH, max(1, round(image.height * MAX_WIDTH / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, lossless=lossless, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
