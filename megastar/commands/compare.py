"""``megastar compare``: train variants of one run with several seeds; probe, sample and score each."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from megastar.commands._shared.common import Parser, config_and_overrides, is_launched, terminal_width
from megastar.commands._shared.outputs import check_outputs
from megastar.config.comparison import CompareConfig
from megastar.config.help import fields_text
from megastar.config.load import config_yaml, load_compare_config
from megastar.errors import UserError
from megastar.utils.printable import say

if TYPE_CHECKING:
    from rich.console import Console

    from megastar.experiments.plan import PlannedRun

EXAMPLES = """
megastar compare configs/run/compare_emoji.yaml            AR, AR with two crops, ST-AR, ablations
megastar compare configs/run/compare_emoji.yaml --dry-run  list the runs and their progress, start nothing
megastar compare configs/run/compare_emoji.yaml out=runs/try base.train.steps=300 'seeds=[0]'
megastar compare configs/run/compare_emoji.yaml out=runs/tune probe.score_on=val 'score.against=[val]'
megastar compare mine.yaml base=configs/run/star_b_50ep.yaml base.train.steps=20000 nproc=8
megastar compare --redraw runs/compare_emoji               rewrite tables and figures from results.json
Repeating an interrupted command resumes it; finished runs and results are kept.
"""


def parser() -> Parser:
    p = Parser(
        "compare",
        "Train variants of a run on the same images with the same seeds; then probe, sample and score each in the same way.",
        EXAMPLES,
        fields_text(CompareConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | section.field=value", help="a YAML file, fields to override")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs and start nothing")
    what.add_argument("--print-config", action="store_true", help="print every field as YAML and exit")
    what.add_argument("--redraw", metavar="OUT", help="only rewrite the tables and figures of this folder")
    what.add_argument("--evaluate", metavar="RUN", help="only measure this trained run: VARIANT-seedN")
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    path, overrides = config_and_overrides(a.items)
    if a.redraw is not None and a.items:
        raise UserError(f"--redraw {a.redraw} reads everything from that folder: leave out {' '.join(a.items)}")
    if a.redraw is None and path is None:
        raise UserError("name a configuration such as configs/run/compare_emoji.yaml; see megastar compare --help")
    if is_launched(os.environ):
        raise UserError(
            "megastar compare starts its runs itself (nproc, jobs): run it without torchrun, deepspeed or srun"
        )
    cfg = None if a.redraw is not None else load_compare_config(path, overrides)
    if cfg is not None and a.print_config:
        say(config_yaml(cfg).rstrip("\n"))
        return 0
    if cfg is not None and not a.dry_run:
        check_outputs({}, folders={"out =": cfg.out})
    elif a.redraw is not None and os.path.isdir(a.redraw):
        check_outputs({}, folders={"--redraw": a.redraw})
    import torch

    from megastar.engine.metrics.trackers.packages import check_installed
    from megastar.engine.profiling.settings import check_ranks
    from megastar.experiments.comparison import Comparison, redraw
    from megastar.experiments.evaluation import Evaluation
    from megastar.experiments.plan import check_thresholds, is_trained, plan_runs, take_sizes_of_codes
    from megastar.utils.logs import shared_console

    console = shared_console()
    if not a.dry_run and a.evaluate is None:
        check_results(Path(cfg.out if cfg else a.redraw), "out =" if cfg else "--redraw")
    if cfg is None:
        redraw(Path(a.redraw), console)
        return 0
    gpus = torch.cuda.device_count()
    runs = plan_runs(cfg, gpus)
    for run in runs:  # what would end each of them after the images are encoded
        if not is_trained(run):
            check_installed(run.cfg.train.trackers, f"{run.name}: train.trackers")
            check_ranks(run.cfg.train.profile, cfg.nproc, run.folder)
    check_thresholds(cfg)
    if text := take_sizes_of_codes(cfg, runs):  # of an earlier start, or of codes=
        console.print(text, highlight=False, markup=False)
    if a.dry_run:
        show_plan(cfg, runs, console)
        return 0
    if a.evaluate is not None:
        named = {run.name: run for run in runs}
        if a.evaluate not in named:
            raise UserError(f"--evaluate {a.evaluate}: the runs are {', '.join(named)}")
        Evaluation(cfg).run(named[a.evaluate], console)
        return 0
    return Comparison(cfg, runs, gpus, shlex.join(["megastar", "compare", *a.items]), console).run()


def check_results(out: Path, name: str) -> None:
    """Raise ``UserError`` for what would end the command when its results are written, hours later.

    ``out``: the folder that the option or field ``name`` names.
    """
    from megastar.evaluation.figure import require_matplotlib
    from megastar.experiments.comparison import OUTPUTS

    require_matplotlib()
    if out.is_dir():
        folders = ("runs", "logs", "evaluation") if name == "out =" else ()  # --redraw writes files only
        check_outputs(
            {f"the {file} of {name}": out / file for file in OUTPUTS},
            folders={f"the folder {folder} of {name}": out / folder for folder in folders},
        )


def show_plan(cfg: CompareConfig, runs: list[PlannedRun], console: Console) -> None:
    """Print the runs, their size and progress, and how the variants differ."""
    from megastar.experiments.codes import check_stored_features
    from megastar.experiments.job_queue import last_step
    from megastar.experiments.plan import changed_fields, check_folder
    from megastar.experiments.tables import print_rows
    from megastar.run_dir.layout import METRICS

    check_folder(cfg, runs)
    check_stored_features(cfg, runs)
    rows = [["run", "steps", "done", "images", "sequences"]]
    for run in runs:
        done = last_step(run.folder / METRICS)
        rows.append([run.name, *(f"{n:,}" for n in (run.steps, done, run.images, run.sequences))])
    print_rows(rows, console)
    for variant, fields in {run.variant: changed_fields(cfg, run) for run in runs}.items():
        console.print(f"{variant}: {'; '.join(fields) or 'the base run'}", highlight=False, markup=False)
    images, sequences = (sum(getattr(run, what) for run in runs) for what in ("images", "sequences"))
    console.print(
        f"\n{len(runs)} runs, {cfg.jobs} at a time, {images:,} images and {sequences:,} sequences in total, in {cfg.out}",
        highlight=False, markup=False,
    )  # fmt: skip
