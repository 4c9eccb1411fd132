"""``megastar status RUN``: where a run is."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._common import Parser, seconds, terminal_width
from megastar.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megastar.run_dir.status import Status

EXAMPLES = """
megastar status runs/star_xl_50ep
megastar status runs/*                       a column for each
megastar status runs/star_xl_50ep --watch 10 again every ten seconds, until Ctrl-C
megastar status runs/star_xl_50ep --json     for scripts; ages and times in seconds
"""


def parser() -> Parser:
    p = Parser(
        "status",
        "Where runs are: state, step, loss, speed, last checkpoint, restarts and why, health, time left. Only the run "
        "folder is read, so it works from any machine that sees it. Status 2 when a folder holds no run.",
        EXAMPLES,
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    p.add_argument("--watch", type=seconds(0.1, 86400), metavar="SECONDS", help="show it again every so many seconds")
    p.add_argument("--json", action="store_true", help="one JSON object a run and line")
    return p


def main(words: list[str]) -> int:
    args = parser().parse_args(words)
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = terminal_width()

    def look() -> tuple[list[Status], list[str]]:
        from megastar.run_dir.status import status_of

        found, problems = [], []
        for run in args.runs:
            try:
                found.append(status_of(Path(run)))
            except UserError as error:
                problems.append(str(error))
        if problems and not found:
            raise UserError("; ".join(problems))
        return found, problems

    def show() -> tuple[bool, list[str]]:
        """Whether some run is not finished, and what is no run."""
        found, problems = look()
        if args.json:
            for status in found:
                print(json.dumps(as_json(status)), flush=True)
        else:
            console.print(table_of(found))
        return any(s.state != "finished" for s in found), problems

    if args.watch is None:
        _, problems = show()
    elif args.json:
        going, problems = show()
        while going:
            time.sleep(args.watch)
            going, problems = show()
    else:
        from rich.live import Live

        found, problems = look()
        with Live(table_of(found), console=console, auto_refresh=False) as live:
            while any(s.state != "finished" for s in found):
                time.sleep(args.watch)
                found, problems = look()
                live.update(table_of(found), refresh=True)
    for problem in problems:
        print(f"megastar: error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def as_json(status: Status) -> dict[str, Any]:
    """Numbers that are not finite become words: JSON has none."""
    from math import isfinite

    pairs = dataclasses.asdict(status).items()
    return {k: str(v) if isinstance(v, float) and not isfinite(v) else v for k, v in pairs}


def table_of(found: list[Status]) -> Table:
    """A line a question, a column a run; lines that say nothing of any run are left out."""
    from rich.table import Table
    from rich.text import Text

    colours = {"running": "green", "finished": "green", "starting": "yellow", "stopped": "red"}
    table = Table("")
    for s in found:
        table.add_column(Text(s.run), overflow="fold")
    columns = [lines_of(s) for s in found]
    for name in columns[0]:
        cells = [c[name] for c in columns]
        if not any(cells):
            continue
        styles = [colours.get(s.state, "") for s in found] if name == "state" else [""] * len(found)
        if name == "health":
            styles = ["red" if s.health else "green" for s in found]
        table.add_row(name, *(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
    return table


def lines_of(s: Status) -> dict[str, str]:
    """Name of a line -> what it says of the run, the same names for every run."""
    from megastar.run_dir.status import duration

    share = f", {s.step / s.steps:.1%}" if s.steps else ""
    waits = ""
    if s.data_wait_s is not None and s.step_s:
        waits = f"{s.data_wait_s:.3g} s a step, {s.data_wait_s / s.step_s:.0%} of it"
    checkpoint = "none"
    if s.checkpoint_step is not None:
        age = f", {duration(s.checkpoint_age_s)} ago" if s.checkpoint_age_s is not None else ""
        checkpoint = f"step {s.checkpoint_step}{age}, {'damaged' if s.checkpoint_problem else 'complete'}"
    if s.saving:
        checkpoint += "; one is being written" if s.state == "running" else "; a half-written one beside it"
    restarts = ""
    if s.restarts:
        restarts = "\n".join([f"{len(s.restarts)}", *s.restarts[-5:]])
    return {
        "state": f"{s.state}: {s.why}",
        "step": f"{s.step} of {s.steps or 'an unknown number'}{share}",
        "loss": f"{s.loss:.4f}" if s.loss is not None else "",
        "validation": f"next-token loss {s.val_loss:.4f} at step {s.val_step}" if s.val_loss is not None else "",
        "speed": f"{s.images_per_s:.3g} images/s, {s.step_s:.3g} s a step" if s.images_per_s and s.step_s else "",
        "data wait": waits,
        "ranks": s.ranks,
        "checkpoint": checkpoint,
        "upload": s.upload,
        "time left": duration(s.left_s) if s.left_s is not None else "",
        "restarts": restarts,
        "excluded": f"{', '.join(s.excluded)}: see bad_hosts.log" if s.excluded else "",
        "health": "\n".join(s.health) or "nothing wrong in the folder",
    }
