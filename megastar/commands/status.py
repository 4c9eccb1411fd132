"""``megastar status``: show the state of runs."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megastar.commands._shared.common import Parser, bounded, print_error, terminal_width
from megastar.commands._shared.json_output import as_line
from megastar.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megastar.run_dir.status import Status

EXAMPLES = """
megastar status runs/star_xl_50ep
megastar status runs/*                       one column per run
megastar status runs/star_xl_50ep --watch 10 refresh every 10 seconds until Ctrl-C
megastar status runs/star_xl_50ep --json     for scripts; ages and times in seconds
"""


def parser() -> Parser:
    p = Parser(
        "status",
        "Show the state of runs: step, loss, speed, last checkpoint, restarts with their reasons, health, time left. "
        "Reads the run folder only, so it works on any machine that can read it. Exit status 2 if a folder is not a run.",
        EXAMPLES,
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    p.add_argument(
        "--watch", type=bounded(float, 0.1, 86400), metavar="SECONDS", help="refresh after this many seconds"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object per run and line")
    return p


def main(words: list[str]) -> int:
    args = parser().parse(words)
    from rich.live import Live

    from megastar.run_dir.status import status_of
    from megastar.utils.console import PlainConsole

    console = PlainConsole()
    if not console.is_terminal:
        console.width = terminal_width()

    def read() -> tuple[list[Status], list[str]]:
        found, problems = [], []
        for run in args.runs:
            try:
                found.append(status_of(Path(run)))
            except UserError as error:
                problems.append(str(error))
        if problems and not found:
            raise UserError("; ".join(problems))
        return found, problems

    with ExitStack() as stack:
        live = None
        while True:
            found, problems = read()
            if args.json:
                for status in found:
                    print(as_line(status), flush=True)
            elif args.watch is None:
                console.print(table_of(found))
            elif live is None:
                live = stack.enter_context(Live(table_of(found), console=console, auto_refresh=False))
            else:
                live.update(table_of(found), refresh=True)
            if args.watch is None or all(s.state == "finished" for s in found):
                break
            time.sleep(args.watch)
    for problem in problems:
        print_error(problem)
    return 2 if problems else 0


def table_of(found: list[Status]) -> Table:
    """A row per property, a column per run; rows that are empty for all runs are omitted."""
    from rich.table import Table
    from rich.text import Text

    from megastar.utils.printable import one_line, printable

    colours = {"running": "green", "finished": "green", "starting": "yellow", "stopped": "red"}
    table = Table("")
    for s in found:
        table.add_column(Text(one_line(s.run)), overflow="fold")
    columns = [lines_of(s) for s in found]
    for name in columns[0]:
        cells = [c[name] for c in columns]
        if not any(cells):
            continue
        styles = [colours.get(s.state, "") for s in found] if name == "state" else [""] * len(found)
        if name == "health":
            styles = ["red" if s.health else "green" for s in found]
        table.add_row(name, *(Text(printable(cell), style) for cell, style in zip(cells, styles, strict=True)))
    return table


def lines_of(s: Status) -> dict[str, str]:
    """Property -> text; every run has the same properties."""
    from megastar.utils.clock import duration

    share = f", {s.step / s.steps:.1%}" if s.steps else ""
    data_wait = ""
    if s.data_wait_s is not None and s.step_s:
        data_wait = f"{s.data_wait_s:.3g} s per step, {s.data_wait_s / s.step_s:.0%} of it"
    checkpoint = "none"
    if s.checkpoint_step is not None:
        age = f", {duration(s.checkpoint_age_s)} ago" if s.checkpoint_age_s is not None else ""
        checkpoint = f"step {s.checkpoint_step}{age}, {'damaged' if s.checkpoint_problem else 'complete'}"
    if s.saving:
        checkpoint += "; another is being written" if s.state == "running" else "; an incomplete one exists"
    restarts = ""
    if s.restarts:
        restarts = "\n".join([f"{len(s.restarts)}", *s.restarts[-5:]])
    return {
        "state": f"{s.state}: {s.why}",
        "step": f"{s.step} of {s.steps or 'an unknown number'}{share}",
        "loss": f"{s.loss:.4f}" if s.loss is not None else "",
        "validation": s.validation
        or (f"next-token loss {s.val_loss:.4f} at step {s.val_step}" if s.val_loss is not None else ""),
        "evaluation": s.evaluation,
        "speed": f"{s.images_per_s:.3g} images/s, {s.step_s:.3g} s per step" if s.images_per_s and s.step_s else "",
        "data wait": data_wait,
        "held by": s.holder,
        "ranks": s.ranks,
        "checkpoint": checkpoint,
        "upload": s.upload,
        "time left": duration(s.left_s) if s.left_s is not None else "",
        "restarts": restarts,
        "ranks and nodes": "\n".join(s.mesh[-5:]),
        "excluded": f"{', '.join(s.excluded)}: see bad_hosts.log" if s.excluded else "",
        "health": "\n".join(s.health) or "no problems found",
    }
