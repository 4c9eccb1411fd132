"""The folder of a comparison: what is done in it, what is left to do, what came out."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.comparison import CompareConfig
from megastar.config.load import save_config
from megastar.errors import UserError
from megastar.experiments import figures, tables
from megastar.experiments.evaluation import Evaluation, tokenizer_of
from megastar.experiments.job_queue import Attempt, Job, Queue, QueueStopped, last_step, tail
from megastar.experiments.plan import PlannedRun, check_folder, check_order, codes_of, is_trained, splits_of
from megastar.experiments.results import Results, gather
from megastar.utils.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

MADE = ("table.md", "results.json", "probe.png", "score.png")


class Comparison:
    """The steps to a comparison's table. ``command`` is told in it."""

    def __init__(self, cfg: CompareConfig, runs: list[PlannedRun], gpus: int, command: str, console: Console):
        self.cfg, self.runs, self.gpus, self.command, self.console = cfg, runs, gpus, command, console
        self.out = Path(cfg.out)
        self.named = {run.name: run for run in runs}
        self.evaluation = Evaluation(cfg)
        self.failed: dict[str, Attempt] = {}

    def run(self) -> int:
        """The exit status: 0, 1 after a failed run, 128 + the signal that stopped it. Raises ``UserError``."""
        self.out.mkdir(parents=True, exist_ok=True)
        with only_one(self.out):
            check_folder(self.cfg, self.runs)
            save_config(self.cfg, self.out / "compare.yaml")
            self.pretokenize()
            self.evaluation.check()
            self.digests = check_order(self.runs)
            for run in self.runs:
                save_config(run.cfg, self.plan_file(run))
            jobs = [job for run in self.runs if (job := self.next_job(run))]
            try:
                Queue(min(self.cfg.jobs, len(self.runs)), self.environments(), self.console).work(jobs, self.after)
            except QueueStopped as stopped:
                self.write()
                self.console.print("stopped; the same command goes on", highlight=False)
                return 128 + stopped.signal
            results, summary = self.write()
        tables.show(results, summary, self.console)
        for name, attempt in self.failed.items():
            self.console.print(f"[red]failed[/] {name}: {attempt.job.stage}, see {attempt.job.log}", highlight=False)
        tell_files(self.out, self.console)
        return 1 if self.failed else 0

    def pretokenize(self) -> None:
        from megastar.data.pretokenize.runner import pretokenize
        from megastar.data.storage.shard_info import MANIFEST

        for split in splits_of(self.cfg):
            out = codes_of(self.cfg, split)
            if not (Path(out) / MANIFEST).is_file():
                pretokenize(self.cfg.pictures, split, tokenizer_of(self.cfg), out, console=self.console)

    # Jobs ------------------------------------------------------------------------------------------------------
    def plan_file(self, run: PlannedRun) -> Path:
        return self.out / "plan" / f"{run.name}.yaml"

    def next_job(self, run: PlannedRun) -> Job | None:
        """What is to be done of ``run``: train, then evaluate, then nothing."""
        logs = self.out / "logs"
        if not is_trained(run):
            several = ["--nproc", str(self.cfg.nproc)] if self.cfg.nproc > 1 else []
            words, log = ["train", str(self.plan_file(run)), *several], logs / f"{run.name}-train.log"
            return Job(run.name, "train", words, log, run.steps, lambda: last_step(run.folder / "metrics.jsonl"))
        if missing := self.evaluation.missing(run):
            words = ["compare", str(self.out / "compare.yaml"), "--evaluate", run.name]
            files = [self.evaluation.file(part) for part in missing]

            def done() -> int:
                return sum(file is not None and file.is_file() for file in files)

            return Job(run.name, "evaluate", words, logs / f"{run.name}-evaluate.log", len(files), done)
        return None

    def after(self, attempt: Attempt) -> list[Job]:
        """Note what an attempt cost and what came out; what follows it."""
        job = attempt.job
        try:
            self.note(attempt)
            if not attempt.cut:
                self.write()
        except OSError as error:  # the runs go on: what they write is theirs, and the end tries again
            self.console.print(f"[yellow]warning[/] {self.out} takes no writing: {error.strerror}", highlight=False)
        if attempt.cut:
            return []
        if attempt.status:
            return self.fail(attempt, f"ended with status {attempt.status}")
        self.console.print(f"{job.title} done in {attempt.seconds / 60:.1f} min", highlight=False)
        follows = self.next_job(self.named[job.run])
        if follows and follows.stage == job.stage:
            return self.fail(attempt, "says that it is done and left nothing")
        return [follows] if follows else []

    def fail(self, attempt: Attempt, how: str) -> list[Job]:
        """Of this run nothing more is tried; the others go on."""
        job = attempt.job
        self.failed[job.run] = attempt
        self.console.print(f"[red]failed[/] {job.title} {how}, its log is {job.log}:", highlight=False)
        self.console.print(tail(job.log), markup=False, highlight=False)
        return []

    def note(self, attempt: Attempt) -> None:
        """Add to times.json: all attempts of a run's stage together."""
        times = self.times()
        mine = times.setdefault(f"{attempt.job.run} {attempt.job.stage}", {})
        steps, seconds, cpu_s = attempt.steady
        more = {"seconds": attempt.seconds, "cpu_s": attempt.cpu_s, "attempts": 1}
        more |= {"steady_steps": steps, "steady_seconds": seconds, "steady_cpu_s": cpu_s}
        for name, value in more.items():
            mine[name] = mine.get(name, 0) + value
        write_atomic(self.out / "times.json", (json.dumps(times, indent=1) + "\n").encode())

    def times(self) -> dict[str, dict[str, float]]:
        try:
            times: dict[str, dict[str, float]] = json.loads((self.out / "times.json").read_text())
            return times
        except (FileNotFoundError, ValueError):
            return {}

    def environments(self) -> list[dict[str, str]]:
        """Of each place in the queue: threads on a CPU, GPUs of its own as far as there are enough."""
        jobs, nproc = min(self.cfg.jobs, len(self.runs)), self.cfg.nproc
        if not self.gpus:
            threads = max(1, len(os.sched_getaffinity(0)) // (jobs * nproc))
            return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]
        known = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")[: self.gpus]
        places = [[known[(slot * nproc + i) % len(known)] for i in range(nproc)] for slot in range(jobs)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(place)} for place in places]

    # What came out ---------------------------------------------------------------------------------------------
    def write(self) -> tuple[Results, dict[str, Any]]:
        """results.json, table.md and the figures, of what there is so far."""
        from megastar.evaluation.runner import _versions

        times = self.times()
        rows = {run.name: gather(run, self.evaluation, times, self.digests[run.name]) for run in self.runs}
        results = Results(self.cfg, self.runs, rows, self.gpus)
        summary = results.summary()
        told = {
            "command": self.command,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": _versions(),
            "gpus": self.gpus,
            "config": asdict(self.cfg),
            "times": times,
            "failed": {
                name: {"stage": f.job.stage, "status": f.status, "log": str(f.job.log)}
                for name, f in self.failed.items()
            },
            "majority": majority(self.cfg),
            "summary": summary,
            "runs": rows,
        }
        write_files(self.out, told, results)
        return results, summary


def redraw(folder: Path, console: Console) -> None:
    """Tables and figures anew from results.json, which need neither runs nor pictures. Raises ``UserError``."""
    from megastar.config.load import load_compare_config
    from megastar.experiments.plan import plan_runs

    try:
        told = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/results.json cannot be read ({error}): name the out folder of a comparison"
        ) from error
    cfg = load_compare_config(folder / "compare.yaml")
    results = Results(cfg, plan_runs(cfg, 0), told["runs"], told.get("gpus", 0))
    told |= {"summary": results.summary(), "majority": told.get("majority") or majority(cfg)}
    write_files(folder, told, results)
    tables.show(results, told["summary"], console)
    tell_files(folder, console)


def write_files(folder: Path, told: Mapping[str, Any], results: Results) -> None:
    """results.json first: the rest follows from it."""
    write_atomic(folder / "results.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomic(folder / "table.md", tables.markdown(results, told["summary"], told["command"]).encode())
    figures.draw(results, folder, told["majority"])


def tell_files(folder: Path, console: Console) -> None:
    for name in MADE:
        if (folder / name).is_file():
            console.print(f"{name + ':':<14}{(folder / name).resolve()}", highlight=False, soft_wrap=True, markup=False)


def majority(cfg: CompareConfig) -> dict[str, Any] | None:
    """Accuracy on the scored split of naming the class that is the most frequent in the fitted one; None without codes."""
    import numpy as np

    from megastar.checkpoint.find_weights import labels_of

    try:
        fitted, scored = (labels_of(codes_of(cfg, split)) for split in (cfg.probe.fit_on, cfg.probe.score_on))
    except (UserError, OSError):
        return None
    name = int(np.bincount(fitted).argmax())
    return {"class": name, "accuracy": float(np.mean(np.asarray(scored) == name))}


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
