"""``megastar doctor``: diagnose this node, or all nodes of a job, and suggest fixes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from megastar.commands._shared.common import Parser, bounded, is_launched, place_of, processes, terminal_width
from megastar.commands._shared.json_output import DoctorReport, only_json

if TYPE_CHECKING:
    from rich.table import Table

    from megastar.diagnosis.checks import Report

EXAMPLES = """
megastar doctor                                             this machine
srun megastar doctor runs/star_xl                           all nodes of the job and the network between them
megastar doctor --nproc 8                                   eight local processes: NCCL within the node
torchrun --nproc-per-node 8 -m megastar doctor              the same
megastar doctor /shared/runs/x --cache /scratch/me          permissions, free space and speed of both disks
megastar doctor --s3 s3://bucket/codes --upload s3://bucket/runs
megastar doctor --json                                      for scripts
"""


def parser() -> Parser:
    p = Parser(
        "doctor",
        "Check versions, driver, GPUs, memory, limits, disks and S3 of this node. Under srun or torchrun, check all "
        "nodes, compare their clocks and versions, and measure the all-reduce bandwidth. Exit status 1 if a check fails. "
        "Changes nothing: files written to measure a disk are removed.",
        EXAMPLES,
    )
    # A positional, because torchrun parses --run as an abbreviation of its own --run-path.
    p.add_argument("run", nargs="?", default="", metavar="RUN", help="run folder to check; all nodes must share it")
    p.add_argument("--cache", default="", metavar="FOLDER", help="data.cache folder of the node to check")
    p.add_argument("--s3", default="", metavar="URL", help="s3:// prefix of token shards: list it and read a range")
    p.add_argument("--upload", default="", metavar="URL", help="train.upload: write a small object and remove it")
    p.add_argument("--nproc", type=processes, default=1, help="local processes (default 1); ignored under a launcher")
    p.add_argument(
        "--patience", type=bounded(float, 1, 3600), default=60.0, metavar="SECONDS", help="time limit of each check"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return p


def main(words: list[str]) -> int:
    from megastar.utils.console import PlainConsole

    console = PlainConsole(stderr=True)
    args = parser().parse(words, console)
    from megastar.data.storage.s3_client import split_url

    for url in filter(None, (args.s3, args.upload)):
        split_url(url)  # raises before anything is measured
    if args.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._shared.launch import launch

        return launch(args.nproc, ["doctor", *words])
    from megastar.diagnosis.checks import DoctorOptions, run_checks
    from megastar.diagnosis.finding import hung

    rank, world, _ = place_of(os.environ)
    options = DoctorOptions(args.run, args.cache, args.s3, args.upload, args.patience)
    status = 0
    with only_json(args.json) as print_json:
        report = run_checks(options, rank, world, console.print)
        if report is not None:
            status = int(report.failed)
            if args.json:
                checks = [a.as_dict() for a in report.answers]
                print_json(DoctorReport(not report.failed, report.nodes, report.ranks, checks))
            else:
                show(report)
    if hung:  # a thread that waits for a disk or a GPU would keep the process alive
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def show(report: Report) -> None:
    from megastar.utils.console import PlainConsole

    console = PlainConsole(width=terminal_width())
    console.print(table_of(report))
    levels = [a.finding.level for a in report.answers]
    count = {level: levels.count(level) for level in ("failure", "warning")}
    summary = ", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in count.items() if n)
    console.print(f"{len(report.nodes)} node(s): {summary or 'no problems'}")


def table_of(report: Report) -> Table:
    """One row per finding; nodes are named only where they differ."""
    from rich.table import Table
    from rich.text import Text

    from megastar.diagnosis.finding import compact, shortened
    from megastar.utils.printable import printable

    colours = {"OK": "green", "warning": "yellow", "failure": "bold red"}
    answers = shortened(report.answers)
    differing = len(report.nodes) > 1 and any(not a.everywhere for a in answers)
    has_remedies = any(a.finding.remedy for a in answers)
    table = Table("check", "", *(["nodes"] if differing else []), "finding", *(["remedy"] if has_remedies else []))
    for column in table.columns:
        column.overflow = "fold"
    before = ""
    for answer in answers:
        f = answer.finding
        where = [Text("" if answer.everywhere else compact(answer.nodes))] if differing else []
        name = f.name if f.name != before else ""
        remedy = [Text(printable(f.remedy))] if has_remedies else []
        table.add_row(Text(name), Text(f.level, colours[f.level]), *where, Text(printable(f.finding)), *remedy)
        before = f.name
    return table
