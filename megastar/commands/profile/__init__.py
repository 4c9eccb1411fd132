"""``megastar profile``: print the profile of a run's steps."""

from __future__ import annotations

from pathlib import Path

from megastar.commands._shared.common import Parser, natural, positive, terminal_width
from megastar.errors import UserError

EXAMPLES = """
megastar profile runs/demo/run
megastar profile runs/demo/run --rank 8 --top 30
megastar train configs/run/demo.yaml train.profile.start=20 train.profile.steps=3      writes RUN/profile
megastar train configs/run/star_xl_50ep.yaml 'train.profile={start: 100, steps: 3, ranks: [0, 8]}'
docs/profiling.md explains the tables and the trace.
"""


def parser() -> Parser:
    p = Parser(
        "profile",
        "Print what train.profile recorded: time by phase, kernel and operator, and host synchronizations; and where to "
        "open the trace. Loads no model.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run folder")
    p.add_argument("--rank", type=natural, help="only this rank (default: all profiled ones)")
    p.add_argument("--top", type=positive, default=12, help="rows of each table")
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    from rich.table import Table
    from rich.text import Text

    from megastar.run_dir.profiles import TABLES, headline, read_profiles, table_rows
    from megastar.utils.console import PlainConsole

    found = read_profiles(a.run)
    ranks = sorted({summary["rank"] for _, summary in found})
    if a.rank is not None and a.rank not in ranks:
        raise UserError(
            f"--rank {a.rank}: {a.run} has profiles of rank {', '.join(map(str, ranks))}: name one of these"
        )
    console = PlainConsole()
    if not console.is_terminal:
        console.width = terminal_width()
    for path, summary in found:
        if a.rank not in (None, summary["rank"]):
            continue
        console.print(Text(headline(summary), style="bold"))
        for key, title, what in TABLES:
            rows = list(table_rows(summary, key, a.top))
            if not rows:
                continue
            table = Table("ms/step", "share", "calls/step", what, title=title, title_justify="left", box=None)
            for column in table.columns[:3]:
                column.justify = "right"
            table.columns[3].overflow = "fold"
            for name, calls, ms, share in rows:
                table.add_row(ms, share, calls, Text(name))
            console.print(table)
        if not summary["host_syncs"]:
            console.print("host synchronizations: none")
        folder = path.parent
        places = [f"trace: {folder / summary['trace']} (open it at https://ui.perfetto.dev or in chrome://tracing)"]
        if summary.get("memory"):
            places.append(f"memory: {folder / summary['memory']} (open it at https://pytorch.org/memory_viz)")
        console.print(Text("\n".join(places) + "\n"), soft_wrap=True)
    return 0
