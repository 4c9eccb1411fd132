"""From the measurements of each run to means, standard deviations and differences within a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from megastar.config.comparison import CompareConfig
from megastar.data.shards.manifest import load_manifest
from megastar.data.token_order import validates_permuted
from megastar.errors import UserError
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import PlannedRun, baselines
from megastar.experiments.training_scores import is_of
from megastar.run_dir.evaluations import describe_reference, epochs_to, read_evaluations
from megastar.run_dir.events import read_events
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import METRICS

LAST, BEST = "probe, last position (%)", "probe, best position (%)"
LOSS = "validation loss"
HIGHER = ("probe", "IS", "precision", "recall")  # prefixes of quantities of which higher is better


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds; the deviation of one value is None."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": list(values),
    }


def gather(
    run: PlannedRun, evaluation: Evaluation, times: Mapping[str, Mapping[str, Any]], digest: str
) -> dict[str, Any]:
    """All measurements of a run so far."""
    rows = read_jsonl(run.folder / METRICS)
    speeds = [r["images_per_s"] for r in rows if "images_per_s" in r]
    losses = [r["val_loss_ar"] for r in rows if "val_loss_ar" in r]
    trained = times.get(f"{run.name} train", {})
    ended = [e["step_cpu_s"] for e in read_events(run.folder) if isinstance(e.get("step_cpu_s"), float)]
    ranks, batch = evaluation.cfg.nproc, run.cfg.train.global_batch
    out: dict[str, Any] = {
        "variant": run.variant,
        "seed": run.seed,
        "folder": str(run.folder),
        "steps": run.steps,
        "done": rows[-1]["step"] if rows else 0,
        "images": run.images,
        "sequences": run.sequences,
        "order_sha256": digest,
        "images_per_s": statistics.median(speeds) if speeds else None,
        "step_cpu_ms_per_image": 1000 * ranks * ended[-1] / batch if ended else None,  # of rank 0, times the ranks
        "train_seconds": trained.get("seconds"),
        "train_cpu_s": trained.get("cpu_s"),
        "evaluate_seconds": times.get(f"{run.name} evaluate", {}).get("seconds"),
        "val_loss_ar": losses[-1] if losses else None,
        "last_row": next((r for r in reversed(rows) if "loss" in r), {}),
        "scored": scored_while_training(run, evaluation, rows[-1]["step"] if rows else 0),
        "validation_order": validation_order(run),
        "weights": {},
        "curve": {},
    }
    for part in evaluation.parts(run):
        result = evaluation.read(part)
        if result is None:
            continue
        if part.what == "score":
            kept = ("metric", "value", "scores", "floor", "warnings")
            result = {s: {k: r[k] for k in kept if k in r} for s, r in result.items()}
        kind, key = ("curve", str(part.step)) if part.curve else ("weights", part.weights)
        out[kind].setdefault(key, {})[part.what] = result
    return out


def scored_while_training(run: PlannedRun, evaluation: Evaluation, until: int) -> list[dict[str, Any]]:
    """The scores of a run's weights up to step ``until`` that were made with the settings ``base.eval``."""
    return [r for r in read_evaluations(run.folder, until) if is_of(r, evaluation.wanted)]


def validation_order(run: PlannedRun) -> str:
    """The order of the tokens in which a run is validated, raster or random: losses of the two are not comparable.

    Without the codes, whose number of images is needed for an annealing that counts epochs, such a run counts as one that
    is not annealed.
    """
    order = run.cfg.token_order
    if order.kind == "random" and order.anneal_unit == "epochs":
        try:
            samples = load_manifest(run.cfg.data.shards).samples
        except (UserError, OSError):
            return "random"
        return "random" if validates_permuted(run.cfg, samples) else "raster"
    return "random" if validates_permuted(run.cfg, 1) else "raster"


def score_of(weights: str, split: str, metric: str, row: Mapping[str, Any]) -> Any:
    return row["weights"][weights]["score"][split]["scores"][metric]


class Results:
    """The rows of all runs (of ``gather``), and the statistics over them."""

    def __init__(
        self, cfg: CompareConfig, runs: Sequence[PlannedRun], rows: Mapping[str, Mapping[str, Any]], gpus: int
    ):
        self.cfg, self.runs, self.rows, self.gpus = cfg, runs, rows, gpus
        self.labels = {name: v.label or name for name, v in cfg.variants.items()}
        self.baselines = baselines(cfg, runs)
        self.validated: dict[str, str] = {}  # variant -> the order of the tokens in its validation
        for run in runs:
            recorded = rows.get(run.name, {}).get("validation_order")
            if recorded or run.variant not in self.validated:
                self.validated[run.variant] = recorded or validation_order(run)

    def of(self, variant: str, value: Callable[[Mapping[str, Any]], Any]) -> dict[int, Any]:
        """Seed -> value, for the runs that have it."""
        found = {}
        for run in self.runs:
            if run.variant == variant and run.name in self.rows:
                with suppress(KeyError, TypeError):
                    found[run.seed] = value(self.rows[run.name])
        return {seed: v for seed, v in found.items() if v is not None}

    def quantities(self, weights: str) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """Name of a quantity -> how to read it from a row. The loss is always of the student, whatever ``weights`` are."""
        out: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            LAST: lambda r: 100 * r["weights"][weights]["probe"]["accuracy"][-1],
            BEST: lambda r: 100 * max(r["weights"][weights]["probe"]["accuracy"]),
        }
        for split in self.cfg.score.against:
            for metric in self.metrics(weights, split):
                out[f"{metric} ({split})"] = partial(score_of, weights, split, metric)
        return out | {LOSS: lambda r: r["val_loss_ar"] if r["done"] == r["steps"] else None}

    def metrics(self, weights: str, split: str) -> list[str]:
        for row in self.rows.values():
            if "score" in row["weights"].get(weights, {}):
                return list(row["weights"][weights]["score"][split]["scores"])
        return []

    def cost(self, variant: str) -> dict[str, Any]:
        """Seconds per run, wall-clock and CPU milliseconds per image: medians over the finished runs.

        Milliseconds are those of the steps alone, except the CPU's of old results: ``includes`` says what they have besides.
        ``relative``: the milliseconds divided by those of each baseline; CPU time, or wall-clock time with GPUs.
        """
        out = self._cost(variant)
        kind = "ms_per_image" if self.gpus else "cpu_ms_per_image"
        others = {b: self._cost(b)[kind] for b in self.baselines}
        out["relative"] = {b: out[kind] / other if out[kind] and other else None for b, other in others.items()}
        return out

    def _cost(self, variant: str) -> dict[str, Any]:
        def median(value: Callable[[Mapping[str, Any]], Any]) -> float | None:
            values = self.of(variant, lambda r: value(r) if r["done"] == r["steps"] else None).values()
            return statistics.median(values) if values else None

        cpu, includes = median(lambda r: r.get("step_cpu_ms_per_image")), ""
        if cpu is None:
            cpu, includes = median(lambda r: r.get("cpu_ms_per_image")), "validation and saving"
        if cpu is None:
            cpu, includes = median(lambda r: 1000 * r["train_cpu_s"] / r["images"]), "start-up, validation and saving"
        return {
            "seconds": median(lambda r: r["train_seconds"]),
            "ms_per_image": median(lambda r: 1000 / r["images_per_s"]),
            "cpu_ms_per_image": cpu,
            "includes": includes,
        }

    def epochs_to(self, variant: str, threshold: float) -> tuple[list[float], int]:
        """The first evaluated epoch at or below ``threshold`` of each run that reached it, and the number of runs that were
        scored while they trained. A run counts if all steps that are due before it reached the threshold were scored, or all
        steps so far: otherwise the first epoch is unknown."""
        known = []
        for row in self.of(variant, lambda r: r if r.get("scored") else None).values():
            found = self.due_scores(row)
            epoch, unscored = epochs_to(found, [threshold])[threshold], self.unscored(row)
            until = next((r["step"] for r in found if r["value"] <= threshold), math.inf)
            if found and not any(step < until for step in unscored):
                known.append(epoch)
        return [epoch for epoch in known if epoch is not None], len(known)

    def due_scores(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The scores of a run at the steps of ``base.eval.every``: an earlier start may have scored others besides."""
        e = self.cfg.base.eval
        return [r for r in row["scored"] if not e.every or e.due(r["step"], row["steps"])]

    def unscored(self, row: Mapping[str, Any]) -> list[int]:
        """The steps of ``base.eval.every`` that a run has done and that have no score of the settings ``base.eval``. Of a run
        that has steps left, those before its last score: the newest one may be under way."""
        e, steps, scored = self.cfg.base.eval, row["steps"], {r["step"] for r in row.get("scored", [])}
        done = steps if row["done"] == steps else max(scored, default=0)
        due = {*range(e.every, done + 1, e.every), *([steps] if done == steps else [])} if e.every else set()
        return sorted(due - scored)

    def scored_metric(self) -> str:
        """The name of the score of the evaluations while training; empty where no run has one."""
        return next((str(r["scored"][-1]["metric"]) for r in self.rows.values() if r.get("scored")), "")

    def scored_against(self) -> list[str]:
        """The references of these evaluations, one unless results.json is of an older version."""
        found = [describe_reference(r["scored"][-1]) for r in self.rows.values() if r.get("scored")]
        return list(dict.fromkeys(found))

    def pairs(self) -> list[tuple[str, str]]:
        """(variant, baseline), each pair once."""
        out = []
        for i, baseline in enumerate(self.baselines):
            out += [(v, baseline) for v in self.cfg.variants if v not in self.baselines[: i + 1]]
        return out

    def summary(self) -> dict[str, Any]:
        """By weights and variant: mean and deviation of each quantity, and its differences within a seed."""
        thresholds = self.cfg.base.eval.thresholds if self.scored_metric() else []
        reached = {v: {f"{k:g}": self.epochs_to(v, k) for k in thresholds} for v in self.cfg.variants}
        out: dict[str, Any] = {
            "epochs_to": {v: {k: {"epochs": e, "runs": n} for k, (e, n) in x.items()} for v, x in reached.items()},
            "baselines": self.baselines,
            "cost": {v: self.cost(v) for v in self.cfg.variants},
            "weights": {},
            "differences": {},
        }
        for weights in self.cfg.weights:
            table: dict[str, Any] = {}
            pairs: dict[str, Any] = {}
            for name, value in self.quantities(weights).items():
                found = {v: self.of(v, value) for v in self.cfg.variants}
                table[name] = {v: spread(list(x.values())) for v, x in found.items() if x}
                for b, a in self.pairs():
                    if name == LOSS and self.validated[a] != self.validated[b]:
                        continue
                    if common := [s for s in found[a] if s in found[b]]:
                        pairs.setdefault(f"{b} - {a}", {})[name] = spread([found[b][s] - found[a][s] for s in common])
            out["weights"][weights], out["differences"][weights] = table, pairs
        return out
