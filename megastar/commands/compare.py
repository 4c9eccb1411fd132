"""``megastar compare``: train variants of one run with several seeds, probe, sample and score them alike, tell the result."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megastar.commands.common import Parser, config_and_overrides, terminal_width
from megastar.config.comparison import CompareConfig
from megastar.config.help import fields_text
from megastar.config.load import load_compare_config, save_config
from megastar.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from megastar.commands.comparison.evaluation import Evaluation
    from megastar.commands.comparison.plan import Run
    from megastar.commands.comparison.queue import Attempt, Job
    from megastar.commands.comparison.results import Results

EXAMPLES = """
megastar compare configs/run/compare_emoji.yaml                       AR, AR with two crops, ST-AR, ablations, three seeds
megastar compare configs/run/compare_emoji.yaml --dry-run             which runs, how long each, nothing is started
megastar compare configs/run/compare_emoji.yaml out=runs/try base.train.steps=300 seeds=[0] jobs=1
megastar compare configs/run/compare_emoji.yaml probe.score_on=val score.against=[val]         to tune
megastar compare mine.yaml base=configs/run/star_b_50ep.yaml base.train.steps=20000 nproc=8
The same command again goes on where it was cut: finished runs and results are not made again.
"""


def parser() -> Parser:
    p = Parser(
        "compare",
        "Train variants of a run on the same pictures with the same seeds; then probe, sample and score each alike.",
        EXAMPLES,
        fields_text(CompareConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | section.field=value", help="a YAML file, then other values")
    p.add_argument("--dry-run", action="store_true", help="tell which runs there are and start nothing")
    p.add_argument(
        "--evaluate", default=None, metavar="RUN", help="only measure this run, which is trained: VARIANT-seedN"
    )
    return p


def main(words: list[str]) -> int:
    a = parser().parse_intermixed_args(words)
    path, overrides = config_and_overrides(a.items)
    if path is None:
        raise UserError("name a configuration, as configs/run/compare_emoji.yaml; see megastar compare --help")
    cfg = load_compare_config(path, overrides)
    from rich.console import Console

    from megastar.commands.comparison.evaluation import Evaluation
    from megastar.commands.comparison.plan import plan_runs

    gpus = count_gpus()
    runs = plan_runs(cfg, gpus)
    console = Console()
    if a.dry_run:
        show_plan(cfg, runs, console)
        return 0
    if a.evaluate is not None:
        named = {run.name: run for run in runs}
        if a.evaluate not in named:
            raise UserError(f"--evaluate {a.evaluate}: the runs are {', '.join(named)}")
        Evaluation(cfg).work(named[a.evaluate], console)
        return 0
    return Comparison(cfg, runs, gpus, a.items, console).run()


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def show_plan(cfg: CompareConfig, runs: list[Run], console: Console) -> None:
    """Runs, how much each sees, in what they differ."""
    from rich.table import Table

    from megastar.commands.comparison.plan import difference

    table = Table(
        "", "run", "steps", "images", "sequences", "differs from base in", title=f"{len(runs)} runs, {cfg.jobs} at once"
    )
    for i, run in enumerate(runs):
        differs = "; ".join(difference(cfg, run)) or "nothing"
        table.add_row(str(i + 1), run.name, f"{run.steps:,}", f"{run.images:,}", f"{run.sequences:,}", differs)
    console.print(table)
    images = sum(run.images for run in runs)
    console.print(
        f"{images:,} images and {sum(r.sequences for r in runs):,} sequences in all -> {cfg.out}", highlight=False
    )


class Comparison:
    """The folder of a comparison, and the steps to its table."""

    def __init__(self, cfg: CompareConfig, runs: list[Run], gpus: int, items: list[str], console: Console):
        from megastar.commands.comparison.evaluation import Evaluation

        self.cfg, self.runs, self.gpus, self.items, self.console = cfg, runs, gpus, items, console
        self.out = Path(cfg.out)
        self.named = {run.name: run for run in runs}
        self.evaluation: Evaluation = Evaluation(cfg)
        self.failed: dict[str, Attempt] = {}
        self.trained: set[str] = set()  # as `megastar train` said, which resumes under other housekeeping

    def run(self) -> int:
        from megastar.commands.comparison.plan import check_order
        from megastar.commands.comparison.queue import Queue, Stopped

        self.out.mkdir(parents=True, exist_ok=True)
        with only_one(self.out):
            save_config(self.cfg, self.out / "compare.yaml")
            self.pretokenize()
            self.digests = check_order(self.runs)
            for run in self.runs:
                save_config(run.cfg, self.plan_file(run))
            jobs = [job for run in self.runs if (job := self.next_job(run))]
            try:
                Queue(self.cfg.jobs, self.environments(), self.console).work(jobs, self.after)
            except Stopped as stopped:
                self.write()
                self.console.print("stopped; the same command goes on", highlight=False)
                return 128 + stopped.signal
            results = self.write()
        self.tell(results)
        return 1 if self.failed else 0

    def pretokenize(self) -> None:
        from megastar.commands.comparison.evaluation import tokenizer_of
        from megastar.commands.comparison.plan import codes_of, splits_of
        from megastar.data.pretokenize import pretokenize
        from megastar.data.store import MANIFEST

        for split in splits_of(self.cfg):
            if not (Path(codes_of(self.cfg, split)) / MANIFEST).is_file():
                pretokenize(
                    self.cfg.pictures, split, tokenizer_of(self.cfg), codes_of(self.cfg, split), console=self.console
                )

    # Jobs ------------------------------------------------------------------------------------------------------
    def plan_file(self, run: Run) -> Path:
        return self.out / "plan" / f"{run.name}.yaml"

    def next_job(self, run: Run) -> Job | None:
        """What is to be done of ``run``: train, then evaluate, then nothing."""
        from megastar.commands.comparison.queue import Job, last_step

        log = self.out / "logs"
        if not self.is_trained(run):
            words = [
                "train",
                str(self.plan_file(run)),
                *(["--nproc", str(self.cfg.nproc)] if self.cfg.nproc > 1 else []),
            ]
            metrics = run.folder / "metrics.jsonl"
            return Job(run.name, "train", words, log / f"{run.name}-train.log", run.steps, lambda: last_step(metrics))
        if missing := self.evaluation.missing(run):
            words = ["compare", str(self.out / "compare.yaml"), "--evaluate", run.name]
            log_file, files = log / f"{run.name}-evaluate.log", [self.evaluation.file(p) for p in missing]
            done = lambda: sum(f is not None and f.is_file() for f in files)  # noqa: E731
            return Job(run.name, "evaluate", words, log_file, len(missing), done)
        return None

    def is_trained(self, run: Run) -> bool:
        """Whether its last checkpoint is there and of this very configuration; if of another, train has the word."""
        from megastar.config.load import diff_configs, load_config
        from megastar.engine.folders import folder_of, latest, name_of

        there, newest = run.folder / "config.yaml", latest(folder_of(run.cfg))
        if newest is None or newest.name != name_of(run.steps):
            return False
        return run.name in self.trained or (there.is_file() and not diff_configs(load_config(there), run.cfg))

    def after(self, attempt: Attempt) -> list[Job]:
        """Note what an attempt cost; what follows it."""
        from megastar.commands.comparison.queue import tail
        from megastar.data.files import write_atomic

        job = attempt.job
        times = self.times()
        mine = times.setdefault(f"{job.run} {job.stage}", {"seconds": 0.0, "cpu_s": 0.0, "attempts": 0})
        mine["seconds"] += attempt.seconds
        mine["cpu_s"] += attempt.cpu_s
        mine["attempts"] += 1
        write_atomic(self.out / "times.json", (json.dumps(times, indent=1) + "\n").encode())
        if attempt.cut:
            return []
        if attempt.status:
            self.failed[job.run] = attempt
            self.console.print(
                f"[red]failed[/] {job.title} ended with status {attempt.status}, its log is {job.log}:", highlight=False
            )
            self.console.print(tail(job.log), markup=False, highlight=False)
            return []
        if job.stage == "train":
            self.trained.add(job.run)
        told = f"{job.title} done in {attempt.seconds / 60:.1f} min"
        self.console.print(told, highlight=False)
        follows = self.next_job(self.named[job.run])
        self.write()
        if follows and follows.stage == job.stage:  # it says that it is done and left nothing
            self.failed[job.run] = attempt
            self.console.print(f"[red]failed[/] {job.title} made nothing, its log is {job.log}", highlight=False)
            return []
        return [follows] if follows else []

    def environments(self) -> list[dict[str, str]]:
        """Of each place in the queue: threads on a CPU, a GPU of its own where there are enough."""
        cfg = self.cfg
        if not self.gpus:
            threads = max(1, len(os.sched_getaffinity(0)) // cfg.jobs)
            return [{"OMP_NUM_THREADS": str(max(1, threads // cfg.nproc))} for _ in range(cfg.jobs)]
        if cfg.jobs == 1 or "CUDA_VISIBLE_DEVICES" in os.environ:
            return [{} for _ in range(cfg.jobs)]
        each = range(cfg.nproc)
        return [
            {"CUDA_VISIBLE_DEVICES": ",".join(str((slot * cfg.nproc + i) % self.gpus) for i in each)}
            for slot in range(cfg.jobs)
        ]

    def times(self) -> dict[str, dict[str, float]]:
        file = self.out / "times.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    # What came out ---------------------------------------------------------------------------------------------
    def write(self) -> Results:
        """results.json, table.md and the figures, of what there is so far."""
        from dataclasses import asdict

        from megastar.commands.comparison.results import Results, gather
        from megastar.data.files import write_atomic
        from megastar.evaluation.runner import _versions

        times = self.times()
        rows = {run.name: gather(run, self.evaluation, times, self.digests[run.name]) for run in self.runs}
        results = Results(self.cfg, self.runs, rows)
        command = " ".join(["megastar compare", *self.items])
        told = {
            "command": command,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": _versions(),
            "config": asdict(self.cfg),
            "times": times,
            "failed": {
                name: {"stage": f.job.stage, "status": f.status, "log": str(f.job.log)}
                for name, f in self.failed.items()
            },
            "summary": results.summary(),
            "runs": rows,
        }
        write_atomic(self.out / "results.json", (json.dumps(told, indent=1) + "\n").encode())
        write_atomic(self.out / "table.md", results.markdown(self.head(command)).encode())
        results.figures()
        return results

    def head(self, command: str) -> str:
        c = self.cfg
        return (
            f"`{command}`\n\nMean ± standard deviation over seeds. Probe: block {c.probe.block}, null class, fitted on "
            f"{c.probe.fit_on}, scored on {c.probe.score_on}. Scores: {c.sample.count} pictures, cfg_scale "
            f"{c.sample.cfg_scale:g}, temperature {c.sample.temperature:g}, against {' and '.join(c.score.against)}. "
            f"Validation loss: next token, the student's weights."
        )

    def tell(self, results: Results) -> None:
        for weights in self.cfg.weights:
            self.console.print(results.rich(weights))
        for name, attempt in self.failed.items():
            self.console.print(f"[red]failed[/] {name}: {attempt.job.stage}, see {attempt.job.log}", highlight=False)
        for name in ("table.md", "results.json", "probe.png", "score.png"):
            if (self.out / name).is_file():
                self.console.print(
                    f"{name + ':':<14}{(self.out / name).resolve()}", highlight=False, soft_wrap=True, markup=False
                )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises ``UserError`` while another comparison works in ``folder``."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another megastar compare works in {folder}: wait for it, or choose another out=..."
            ) from error
        yield
