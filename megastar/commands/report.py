"""``megastar report``: write one HTML page about run folders."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import Parser, bounded, natural, positive
from megastar.commands._shared.outputs import check_outputs
from megastar.errors import UserError
from megastar.utils.interfaces import LOOPBACK, LOOPBACKS
from megastar.utils.printable import say

if TYPE_CHECKING:
    from megastar.report.page import ReportRun

EXAMPLES = """
megastar report runs/demo/run                                  curves, samples, attention -> runs/demo/run/report.html
megastar report runs/ar runs/star --names AR,ST-AR --out both.html     both runs in the same charts
megastar report runs/star --baseline configs/run/demo.yaml     configuration compared with a file
megastar report runs/star --no-samples --no-attention          takes a second or two, loads no model
megastar report runs/compare                                   all runs of a comparison
megastar report runs/tokenizer-emoji64                         a tokenizer's training: scores and reconstructions by step
megastar report runs/star --serve                              the page at http://127.0.0.1:6060/, kept up to date
Sample grids are generated once per checkpoint and stored in RUN/samples. --serve generates none and shows those that exist.
"""


PORT = 6060
logger = logging.getLogger(__name__)


def parser() -> Parser:
    p = Parser(
        "report",
        "Write one self-contained HTML page about one or more runs: losses, health, speed, samples by step, attention, "
        "configuration, events. Runs may still be in progress.",
        EXAMPLES,
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or output folder of megastar compare")
    p.add_argument("--out", type=Path, help="HTML file to write (default: report.html in the first folder)")
    p.add_argument("--names", help="comma-separated names of the runs (default: their folders)")
    p.add_argument(
        "--baseline",
        help="run folder or configuration to compare with (default: the first run; for one run megastar's defaults)",
    )
    p.add_argument("--no-samples", action="store_true", help="generate no sample grids; show only those in RUN/samples")
    p.add_argument("--per-class", type=positive, default=4, help="images per class in a grid")
    p.add_argument("--no-attention", action="store_true", help="omit the attention maps")
    p.add_argument("--picture", type=natural, default=0, help="index of the image for attention maps")
    p.add_argument("--weights", choices=("ema", "student"), default="ema", help="weights to use")
    p.add_argument("--tokenizer", help="tokenizer .safetensors (default: the run's)")
    p.add_argument("--shards", help="token shards for attention maps (default: the run's)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    live = p.add_argument_group("live view, until Ctrl-C")
    live.add_argument("--serve", action="store_true", help="serve the page by HTTP and refresh it while the runs train")
    live.add_argument("--port", type=bounded(int, 0, 65535), help="port of --serve (default 6060); 0: any free one")
    live.add_argument(
        "--host",
        help="address of --serve (default 127.0.0.1, this machine only); others can read the page without a password",
    )
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    if a.serve and a.out:
        raise UserError("--serve writes no file: leave out --out, or --serve")
    if not a.serve and (a.port is not None or a.host is not None):
        raise UserError("--port and --host belong to --serve: give --serve too")
    inputs = (*a.runs, a.tokenizer, a.baseline, a.shards)
    check_outputs({"--out": a.out}, *inputs)
    if a.serve:
        from megastar.report.live import VERSION

        serve(a, words, lambda: build(a, words, VERSION)[0])
        return 0
    out = a.out or Path(a.runs[0]) / "report.html"
    check_outputs({"--out": out}, *find_folders(a), *inputs)
    from megastar.utils.files import write_output
    from megastar.utils.logs import shared_console

    html, runs = build(a, words)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_output(out, html.encode())
    console = shared_console()
    for run in runs:
        for note in run.notes:
            console.print(f"{run.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    summary = f"{out}  {len(html) / 1e6:.2f} MB, {len(runs)} run{'s' * (len(runs) > 1)}"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)
    return 0


def find_folders(a: argparse.Namespace) -> list[Path]:
    """The run folders. Raises ``UserError``."""
    from megastar.report.read_run import find_runs

    return [f for source in a.runs for f in find_runs(Path(source))]


def build(a: argparse.Namespace, words: list[str], version: str = "") -> tuple[str, list[ReportRun]]:
    """The page of the runs as they are now. With ``version``, for the server, nothing is computed. Raises ``UserError``."""
    from megastar.report.differences import differences
    from megastar.report.page import page
    from megastar.report.read_run import read_run, run_names
    from megastar.report.render_samples import RenderOptions, add_attention, add_grids
    from megastar.utils.logs import shared_console
    from megastar.version import __version__

    console, folders = shared_console(), find_folders(a)
    names = run_names(folders, a.names)
    runs, options = [], RenderOptions(a.weights, a.tokenizer, a.shards, a.device, a.per_class, a.picture)
    for folder, name in zip(folders, names, strict=True):
        run, cfg = read_run(folder, name)
        add_grids(run, cfg, folder, options, console, draw=not (a.no_samples or version))
        if not (a.no_attention or version):
            add_attention(run, cfg, folder, options, console, blocks_for=len(folders))
        runs.append(run)
    baseline, config = baseline_of(a.baseline, runs)
    time = "" if version else f"made {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by "
    html = page(
        runs,
        baseline,
        differences(config, [run.config for run in runs]),
        title="megastar report: " + (", ".join(names) if len(names) <= 3 else f"{len(names)} runs"),
        made=f"{time}megastar {__version__}: {' '.join(['megastar report', *words])}",
        version=version,
    )
    return html, runs


def serve(a: argparse.Namespace, words: list[str], make: Callable[[], str]) -> None:
    """Serve the page until a signal ends the command."""
    from megastar.report.live import LiveReport
    from megastar.report.server import ReportServer

    report = LiveReport(lambda: find_folders(a), make)
    host = a.host or LOOPBACK
    try:
        with ReportServer(report, host, PORT if a.port is None else a.port) as server:
            say(f"{server.url}  (Ctrl-C ends it)")
            if not host.startswith(LOOPBACKS) and host != "localhost":
                logger.warning("everyone who reaches %s can read this report: docs/security.md", server.url)
            server.serve_forever(poll_interval=0.2)
    finally:
        report.close()


def baseline_of(given: str | None, runs: list[ReportRun]) -> tuple[str, dict[str, Any]]:
    """The configuration to compare with: its name on the page, and its fields. Raises ``UserError``."""
    from megastar.config.env_text import recorded
    from megastar.config.load import load_config, load_tokenizer_config
    from megastar.config.schema import RunConfig, TokenizerTrainConfig
    from megastar.report.read_run import read_config

    if given is None:
        first = next((run for run in runs if run.config), None)
        if len(runs) > 1 and first is not None:
            return first.name, first.config or {}
        return "megastar's defaults", asdict(TokenizerTrainConfig() if of_tokenizer(runs) else RunConfig())
    if not Path(given).is_dir():
        return given, recorded(asdict((load_tokenizer_config if of_tokenizer(runs) else load_config)(given)))
    _, config, problem = read_config(Path(given))
    if config is None:
        raise UserError(f"--baseline {given}: {problem}; name a run folder or a configuration file")
    return given, config


def of_tokenizer(runs: list[ReportRun]) -> bool:
    """Whether the first run with a configuration is a tokenizer's training."""
    from megastar.run_dir.tokenizer_run import is_tokenizer_run

    first = next((run.config for run in runs if run.config), None)
    return first is not None and is_tokenizer_run(first)
