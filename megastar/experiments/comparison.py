"""A comparison: its jobs, which of them are done, and the files with its results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.comparison import CompareConfig
from megastar.config.env_text import recorded
from megastar.config.load import save_config
from megastar.errors import UserError
from megastar.experiments import figures, tables
from megastar.experiments.codes import check_codes, check_stored_features, features_to_make
from megastar.experiments.evaluation import Evaluation, find_tokenizer
from megastar.experiments.job_queue import Attempt, Job, JobQueue, QueueStopped, last_step, tail
from megastar.experiments.plan import (
    PlannedRun,
    check_folder,
    check_order,
    codes_folder,
    is_trained,
    needed_splits,
    take_sizes_of_codes,
)
from megastar.experiments.results import Results, gather, scored_while_training
from megastar.run_dir.layout import METRICS
from megastar.run_dir.lease import hold
from megastar.utils.files import write_atomic
from megastar.utils.json_file import ANY, FLOAT, dict_of, integer, read_json, record, text, validator

if TYPE_CHECKING:
    from rich.console import Console

_TIMES = validator(dict_of(text(1000), dict_of(text(1000), FLOAT)))
_RESULTS = validator(record({"runs": ANY, "command": text()}, {"gpus": integer()}))
LAST_SCORE = "last score"  # the stage of a job
OUTPUTS = ("table.md", "results.json", "probe.png", "score.png")


class Comparison:
    """Runs a comparison. ``command`` is recorded in the results."""

    def __init__(self, cfg: CompareConfig, runs: list[PlannedRun], gpus: int, command: str, console: Console):
        self.cfg, self.runs, self.gpus, self.command, self.console = cfg, runs, gpus, command, console
        self.out = Path(cfg.out)
        self.by_name = {run.name: run for run in runs}
        self.evaluation = Evaluation(cfg)
        self.failed: dict[str, Attempt] = {}
        self.tried: set[str] = set()  # runs whose training, and the score of its last step, this call has begun
        self.digests: dict[str, str] = {}  # of the order of images

    def run(self) -> int:
        """Returns the exit status: 0, 1 if a run failed, 128 + the signal that stopped it. Raises ``UserError``."""
        with hold(self.out, "megastar compare", "out"):
            check_folder(self.cfg, self.runs)
            check_stored_features(self.cfg, self.runs)
            save_config(self.cfg, self.out / "compare.yaml")
            self.pretokenize()
            if text := take_sizes_of_codes(self.cfg, self.runs):
                self.console.print(text, highlight=False, markup=False)
                save_config(self.cfg, self.out / "compare.yaml")
            check_codes(self.cfg, self.runs)
            self.evaluation.check()
            self.digests = check_order(self.runs)
            for run in self.runs:
                save_config(run.cfg, self.plan_file(run))
            jobs = [job for run in self.runs if (job := self.next_job(run))]
            try:
                JobQueue(self.environments(), self.console).run(jobs, self.job_ended)
            except QueueStopped as stopped:
                self.write()
                self.console.print("stopped; repeat the command to resume", highlight=False)
                return 128 + stopped.signal
            results, summary = self.write()
        tables.show(results, summary, self.console)
        for attempt in self.failed.values():
            self.console.print(
                f"failed: {attempt.job.title}, see {attempt.job.log}", style="red", markup=False, highlight=False
            )
        print_files(self.out, self.console)
        return 1 if self.failed else 0

    def pretokenize(self) -> None:
        from megastar.data.pretokenize.runner import pretokenize
        from megastar.data.storage.shard_info import MANIFEST

        for split in needed_splits(self.cfg):
            out = codes_folder(self.cfg, split)
            if not (Path(out) / MANIFEST).is_file():
                encoder, weights = features_to_make(self.cfg, self.runs, split)
                pretokenize(
                    self.cfg.pictures, split, find_tokenizer(self.cfg), out, console=self.console,
                    features=encoder, feature_weights=weights or None,
                )  # fmt: skip

    # Jobs ------------------------------------------------------------------------------------------------------
    def plan_file(self, run: PlannedRun) -> Path:
        return self.out / "plan" / f"{run.name}.yaml"

    def next_job(self, run: PlannedRun) -> Job | None:
        """The next job of ``run``: train, then evaluate, then None.

        If the last step of a trained run has no score of ``base.eval``, one job computes it before the evaluation.
        """
        logs = self.out / "logs"
        nproc = ["--nproc", str(self.cfg.nproc)] if self.cfg.nproc > 1 else []
        args, log = ["train", str(self.plan_file(run)), *nproc], logs / f"{run.name}-train.log"
        if not is_trained(run):
            return Job(run.name, "train", args, log, run.steps, lambda: last_step(run.folder / METRICS))
        if run.name not in self.tried and not self.is_scored(run):
            return Job(run.name, LAST_SCORE, args, log, 1, lambda: int(self.is_scored(run)))
        if missing := self.evaluation.missing(run):
            args = ["compare", str(self.out / "compare.yaml"), "--evaluate", run.name]
            files = [self.evaluation.file(part) for part in missing]

            def done() -> int:
                return sum(file is not None and file.is_file() for file in files)

            return Job(run.name, "evaluate", args, logs / f"{run.name}-evaluate.log", len(files), done)
        return None

    def is_scored(self, run: PlannedRun) -> bool:
        """Whether the last step of ``run`` was scored while it trained, if ``base.eval`` asks for that."""
        last = run.steps
        if not self.cfg.base.eval.due(last, last):
            return True
        return any(r["step"] == last for r in scored_while_training(run, self.evaluation, last))

    def job_ended(self, attempt: Attempt) -> list[Job]:
        """Record the times and results of an attempt. Returns the job that follows it."""
        job = attempt.job
        try:
            self.record_times(attempt)
            if not attempt.interrupted:
                self.write()
        except OSError as error:  # the runs continue; results are written again at the end
            self.console.print(
                f"cannot write to {self.out}: {error.strerror}", style="yellow", markup=False, highlight=False
            )
        if attempt.interrupted:
            return []
        run = self.by_name[job.run]
        if attempt.status and job.stage != LAST_SCORE:
            return self.fail(attempt, f"ended with status {attempt.status}")
        if not attempt.status:
            self.console.print(f"{job.title} done in {attempt.seconds / 60:.1f} min", highlight=False)
        if job.stage != "evaluate":
            self.tried.add(run.name)
            if is_trained(run) and not self.is_scored(run):  # a score of samples stops no run, as in `megastar train`
                text = f"{run.name}: its last step was not scored (base.eval), see {job.log}; the next call tries again"
                self.console.print(text, style="yellow", markup=False, highlight=False)
        following = self.next_job(run)
        if following and following.stage == job.stage:
            return self.fail(attempt, "ended with status 0 but wrote no result")
        return [following] if following else []

    def fail(self, attempt: Attempt, how: str) -> list[Job]:
        """Print why an attempt failed. This run has no further jobs; the others continue."""
        from rich.text import Text

        job = attempt.job
        self.failed[job.run] = attempt
        self.console.print(f"failed: {job.title} {how}; end of {job.log}:", style="red", markup=False, highlight=False)
        self.console.print(Text(tail(job.log)))
        return []

    def record_times(self, attempt: Attempt) -> None:
        """Add an attempt to times.json, which sums over all attempts of a run's stage."""
        times = self.times()
        sums = times.setdefault(f"{attempt.job.run} {attempt.job.stage}", {})
        own = {"seconds": attempt.seconds, "cpu_s": attempt.cpu_s, "attempts": 1}
        for name, value in own.items():
            sums[name] = sums.get(name, 0) + value
        write_atomic(self.out / "times.json", (json.dumps(times, indent=1) + "\n").encode())

    def times(self) -> dict[str, dict[str, float]]:
        try:
            times: dict[str, dict[str, float]] = read_json(self.out / "times.json", _TIMES)
            return times
        except UserError:
            return {}

    def environments(self) -> list[dict[str, str]]:
        """The environment of each concurrent job: its number of threads on a CPU, or its own GPUs if there are enough."""
        jobs, nproc = min(self.cfg.jobs, len(self.runs)), self.cfg.nproc
        if not self.gpus:
            threads = max(1, len(os.sched_getaffinity(0)) // (jobs * nproc))
            return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")[: self.gpus]
        slots = [[gpus[(slot * nproc + i) % len(gpus)] for i in range(nproc)] for slot in range(jobs)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(slot)} for slot in slots]

    # Results ---------------------------------------------------------------------------------------------------
    def write(self) -> tuple[Results, dict[str, Any]]:
        """Write results.json, table.md and the figures of the results so far."""
        from megastar.evaluation.runner import package_versions

        times = self.times()
        rows = {run.name: gather(run, self.evaluation, times, self.digests[run.name]) for run in self.runs}
        results = Results(self.cfg, self.runs, rows, self.gpus)
        summary = results.summary()
        content = {
            "command": self.command,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": package_versions(),
            "gpus": self.gpus,
            "config": recorded(asdict(self.cfg)),
            "times": times,
            "failed": {
                name: {"stage": a.job.stage, "status": a.status, "log": str(a.job.log)}
                for name, a in self.failed.items()
            },
            "majority": majority(self.cfg),
            "summary": summary,
            "runs": rows,
        }
        write_files(self.out, content, results)
        return results, summary


def redraw(folder: Path, console: Console) -> None:
    """Write tables and figures again from results.json, without the runs and images. Raises ``UserError``."""
    from megastar.config.load import compare_config_of, load_compare_config
    from megastar.experiments.plan import plan_runs

    content = read_json(folder / "results.json", _RESULTS, "name the out folder of a comparison")
    # Of the start that wrote the results: compare.yaml may be of a later one, which ended before it wrote any.
    if isinstance(settings := content.get("config"), dict):
        cfg = compare_config_of(settings, folder / "results.json")
    else:
        cfg = load_compare_config(folder / "compare.yaml")
    results = Results(cfg, plan_runs(cfg, 0), content["runs"], content.get("gpus", 0))
    content |= {"summary": results.summary(), "majority": content.get("majority") or majority(cfg)}
    write_files(folder, content, results)
    tables.show(results, content["summary"], console)
    print_files(folder, console)


def write_files(folder: Path, content: Mapping[str, Any], results: Results) -> None:
    """results.json first, since the others can be made from it."""
    write_atomic(folder / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomic(
        folder / "table.md",
        tables.markdown(results, content["summary"], content["command"], content.get("failed", {})).encode(),
    )
    figures.draw_probe(results, folder / "probe.png", content["majority"])
    figures.draw_score(results, folder / "score.png")


def print_files(folder: Path, console: Console) -> None:
    for name in OUTPUTS:
        if (folder / name).is_file():
            console.print(f"{name + ':':<14}{(folder / name).resolve()}", highlight=False, soft_wrap=True, markup=False)


def majority(cfg: CompareConfig) -> dict[str, Any] | None:
    """The accuracy on the scored split of always predicting the most frequent class of the fitted one; None without codes."""
    import numpy as np

    from megastar.checkpoint.find_weights import labels_of

    try:
        fitted, scored = (labels_of(codes_folder(cfg, split)) for split in (cfg.probe.fit_on, cfg.probe.score_on))
    except (UserError, OSError):
        return None
    label = int(np.bincount(fitted).argmax())
    return {"class": label, "accuracy": float(np.mean(np.asarray(scored) == label))}
