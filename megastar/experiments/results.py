"""From what was measured of each run to means, spreads and differences within a seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megastar.config.comparison import CompareConfig
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import PlannedRun, baselines
from megastar.run_dir.jsonl import read_jsonl

LAST, BEST = "probe, last position (%)", "probe, best position (%)"
LOSS = "validation loss"
HIGHER = ("probe", "IS", "precision", "recall")  # the beginnings of quantities of which more is better


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds; of one value there is no deviation."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": list(values),
    }


def gather(
    run: PlannedRun, evaluation: Evaluation, times: Mapping[str, Mapping[str, Any]], digest: str
) -> dict[str, Any]:
    """All that is known of a run so far."""
    rows = read_jsonl(run.folder / "metrics.jsonl")
    speeds = [r["images_per_s"] for r in rows if "images_per_s" in r]
    losses = [r["val_loss_ar"] for r in rows if "val_loss_ar" in r]
    trained = times.get(f"{run.name} train", {})
    steps, seconds, cpu_s = (trained.get(f"steady_{what}", 0) for what in ("steps", "seconds", "cpu_s"))
    steady = steps * run.cfg.train.global_batch
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
        "cpu_ms_per_image": 1000 * cpu_s / steady if steady else None,
        "train_seconds": trained.get("seconds"),
        "train_cpu_s": trained.get("cpu_s"),
        "evaluate_seconds": times.get(f"{run.name} evaluate", {}).get("seconds"),
        "val_loss_ar": losses[-1] if losses else None,
        "last_row": next((r for r in reversed(rows) if "loss" in r), {}),
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
        place = (
            out["curve"].setdefault(str(part.step), {}) if part.curve else out["weights"].setdefault(part.weights, {})
        )
        place[part.what] = result
    return out


def score_of(weights: str, split: str, metric: str) -> Callable[[Mapping[str, Any]], Any]:
    """What reads a score from a run's row."""
    return lambda r: r["weights"][weights]["score"][split]["scores"][metric]


class Results:
    """The rows of all runs, and what is read from them."""

    def __init__(
        self, cfg: CompareConfig, runs: Sequence[PlannedRun], rows: Mapping[str, Mapping[str, Any]], gpus: int
    ):
        self.cfg, self.runs, self.rows, self.gpus = cfg, runs, rows, gpus
        self.labels = {name: v.label or name for name, v in cfg.variants.items()}
        self.baselines = baselines(cfg, runs)

    def of(self, variant: str, value: Callable[[Mapping[str, Any]], Any]) -> dict[int, Any]:
        """Seed -> value, of the runs that have it."""
        found = {}
        for run in self.runs:
            if run.variant == variant and run.name in self.rows:
                try:
                    found[run.seed] = value(self.rows[run.name])
                except (KeyError, TypeError):
                    continue
        return {seed: v for seed, v in found.items() if v is not None}

    def quantities(self, weights: str) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """Name of a quantity -> its value in a run's row. The loss is of the student, whatever ``weights`` are."""
        out: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            LAST: lambda r: 100 * r["weights"][weights]["probe"]["accuracy"][-1],
            BEST: lambda r: 100 * max(r["weights"][weights]["probe"]["accuracy"]),
        }
        for split in self.cfg.score.against:
            for metric in self.metrics(weights, split):
                out[f"{metric} ({split})"] = score_of(weights, split, metric)
        return out | {LOSS: lambda r: r["val_loss_ar"] if r["done"] == r["steps"] else None}

    def metrics(self, weights: str, split: str) -> list[str]:
        for row in self.rows.values():
            if "score" in row["weights"].get(weights, {}):
                return list(row["weights"][weights]["score"][split]["scores"])
        return []

    def cost(self, variant: str) -> dict[str, Any]:
        """Seconds a run, milliseconds an image by the clock and of the processors, medians over the finished runs.

        Milliseconds are without start-up; ``with_startup`` where the processors' were not measured so.
        ``relative``: milliseconds over each baseline's, of the processors, of the clock where a GPU does the work.
        """
        out = self._cost(variant)
        kind = "ms_per_image" if self.gpus else "cpu_ms_per_image"
        theirs = {b: self._cost(b)[kind] for b in self.baselines}
        out["relative"] = {b: out[kind] / there if out[kind] and there else None for b, there in theirs.items()}
        return out

    def _cost(self, variant: str) -> dict[str, Any]:
        def ended(r: Mapping[str, Any]) -> bool:
            return bool(r["done"] == r["steps"])

        seconds = self.of(variant, lambda r: r["train_seconds"] if ended(r) else None)
        clock = self.of(variant, lambda r: 1000 / r["images_per_s"] if ended(r) else None)
        cpu = self.of(variant, lambda r: r["cpu_ms_per_image"] if ended(r) else None)
        whole = {} if cpu else self.of(variant, lambda r: 1000 * r["train_cpu_s"] / r["images"] if ended(r) else None)
        names = {"seconds": seconds, "ms_per_image": clock, "cpu_ms_per_image": cpu or whole}
        medians = {name: statistics.median(found.values()) if found else None for name, found in names.items()}
        return {**medians, "with_startup": bool(whole)}

    def pairs(self) -> list[tuple[str, str]]:
        """(variant, baseline), each pair once."""
        out = []
        for i, baseline in enumerate(self.baselines):
            out += [(v, baseline) for v in self.cfg.variants if v not in self.baselines[: i + 1]]
        return out

    def summary(self) -> dict[str, Any]:
        """Per kind of weights and variant: each quantity's mean and spread; and differences within a seed."""
        out: dict[str, Any] = {
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
                    if common := [s for s in found[a] if s in found[b]]:
                        pairs.setdefault(f"{b} - {a}", {})[name] = spread([found[b][s] - found[a][s] for s in common])
            out["weights"][weights], out["differences"][weights] = table, pairs
        return out
