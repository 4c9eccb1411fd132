"""From what was measured of each run to means, spreads, one table and two figures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands.comparison.evaluation import Evaluation
from megastar.commands.comparison.plan import Run, difference
from megastar.config.comparison import CompareConfig

if TYPE_CHECKING:
    from rich.table import Table


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds; of one value there is no deviation."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": list(values),
    }


def gather(run: Run, evaluation: Evaluation, times: Mapping[str, Mapping[str, float]], digest: str) -> dict[str, Any]:
    """All that is known of a run so far."""
    rows = [json.loads(line) for line in read_lines(run.folder / "metrics.jsonl")]
    speeds = [r["images_per_s"] for r in rows if "images_per_s" in r]
    losses = [r["val_loss_ar"] for r in rows if "val_loss_ar" in r]
    trained = times.get(f"{run.name} train", {})
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


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


class Results:
    """The rows of all runs, and what is read from them."""

    def __init__(self, cfg: CompareConfig, runs: Sequence[Run], rows: Mapping[str, Mapping[str, Any]]):
        self.cfg, self.runs, self.rows = cfg, runs, rows
        self.labels = {name: v.label or name for name, v in cfg.variants.items()}

    def of(self, variant: str, value: Callable[[Mapping[str, Any]], Any]) -> dict[int, Any]:
        """Seed -> value, of the runs that have it."""
        found = {}
        for run in self.runs:
            if run.variant == variant:
                try:
                    found[run.seed] = value(self.rows[run.name])
                except (KeyError, TypeError):
                    continue
        return {seed: v for seed, v in found.items() if v is not None}

    def quantities(self, weights: str) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """Name of a column -> its value in a run's row."""
        out: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "probe, last position (%)": lambda r: 100 * r["weights"][weights]["probe"]["accuracy"][-1],
            "probe, best position (%)": lambda r: 100 * max(r["weights"][weights]["probe"]["accuracy"]),
        }
        for split in self.cfg.score.against:
            for metric in self.metrics(weights, split):
                out[f"{metric} ({split})"] = lambda r, s=split, m=metric: r["weights"][weights]["score"][s]["scores"][m]
        out["validation loss"] = lambda r: r["val_loss_ar"]
        return out

    def metrics(self, weights: str, split: str) -> list[str]:
        for row in self.rows.values():
            if "score" in row["weights"].get(weights, {}):
                return list(row["weights"][weights]["score"][split]["scores"])
        return []

    def cost(self, variant: str) -> dict[str, Any]:
        """Milliseconds of the clock and of the processors an image, medians over the runs."""
        clock = self.of(variant, lambda r: 1000 / r["images_per_s"])
        cpu = self.of(variant, lambda r: 1000 * r["train_cpu_s"] / r["images"] if r["done"] == r["steps"] else None)
        return {
            "ms_per_image": statistics.median(clock.values()) if clock else None,
            "cpu_ms_per_image": statistics.median(cpu.values()) if cpu else None,
        }

    def summary(self) -> dict[str, Any]:
        """Per kind of weights and variant: each quantity's mean and spread; and differences within a seed."""
        out: dict[str, Any] = {"cost": {v: self.cost(v) for v in self.cfg.variants}, "weights": {}, "differences": {}}
        main = [n for n, v in self.cfg.variants.items() if v.kind == "main"]
        for weights in self.cfg.weights:
            table, pairs = {}, {}
            for name, value in self.quantities(weights).items():
                found = {v: self.of(v, value) for v in self.cfg.variants}
                table[name] = {v: spread(list(x.values())) for v, x in found.items() if x}
                for a, b in combinations(main, 2):
                    if common := [s for s in found[a] if s in found[b]]:
                        pairs.setdefault(f"{b} - {a}", {})[name] = spread([found[b][s] - found[a][s] for s in common])
            out["weights"][weights], out["differences"][weights] = table, pairs
        return out

    # To read ---------------------------------------------------------------------------------------------------
    def table(self, weights: str) -> list[list[str]]:
        """Header and rows."""
        summary = self.summary()
        quantities, cost = summary["weights"][weights], summary["cost"]
        baseline = next((c["cpu_ms_per_image"] for c in cost.values() if c["cpu_ms_per_image"]), None)
        rows = [["variant", "seeds", "images", "sequences", *quantities, "ms CPU an image"]]
        for variant, label in self.labels.items():
            mine = [r for r in self.runs if r.variant == variant]
            done = [r for r in mine if self.rows[r.name]["done"] >= r.steps]
            counts = [f"{getattr(mine[0], what):,}" for what in ("images", "sequences")] if mine else ["", ""]
            cells = [shown(q[variant]) if variant in q else "" for q in quantities.values()]
            ms = cost[variant]["cpu_ms_per_image"]
            price = f"{ms:.2f} ({ms / baseline:.2f}x)" if ms and baseline else ""
            rows.append([label, f"{len(done)} of {len(mine)}", *counts, *cells, price])
        return rows

    def differences(self, weights: str) -> list[list[str]]:
        """Header and rows: one main variant less another of the same seed."""
        summary = self.summary()
        pairs, names = summary["differences"][weights], list(summary["weights"][weights])
        rows = [["difference", *names]]
        for pair, cells in pairs.items():
            b, a = pair.split(" - ")
            rows.append(
                [f"{self.labels[b]} - {self.labels[a]}", *(shown(cells[n], "+") if n in cells else "" for n in names)]
            )
        return rows

    def markdown(self, head: str) -> str:
        """table.md."""
        out = [head]
        for weights in self.cfg.weights:
            out.append(f"## {weights} weights\n\n{as_markdown(self.table(weights))}")
            if len(pairs := self.differences(weights)) > 1:
                out.append(f"Within a seed, mean and standard deviation of the difference:\n\n{as_markdown(pairs)}")
        changes = {self.labels[r.variant]: difference(self.cfg, r) for r in self.runs}
        out.append("## What differs from the base run\n\n" + as_markdown(
            [["variant", "fields"], *([label, "; ".join(d) or "nothing"] for label, d in changes.items())]
        ))  # fmt: skip
        return "\n\n".join(out) + "\n"

    def rich(self, weights: str) -> Table:
        from rich.table import Table

        header, *rows = self.table(weights)
        table = Table(*header, title=f"{weights} weights: mean ± standard deviation over seeds")
        for row in rows:
            table.add_row(*row)
        return table

    # To see ----------------------------------------------------------------------------------------------------
    def figures(self) -> list[Path]:
        """probe.png and score.png, as far as there is something to draw."""
        from megastar.evaluation.figure import Line, draw_lines

        c, out, written = self.cfg, Path(self.cfg.out), []
        weights, split = c.weights[0], c.score.against[0]
        lines = []
        for variant, v in c.variants.items():
            probes = self.of(variant, lambda r: r["weights"][weights]["probe"]).values()
            ys = [[100 * a for a in p["accuracy"]] for p in probes]
            xs = [p["positions"] for p in probes]
            if ys:
                lines.append(Line(self.labels[variant], xs[0], ys, thin=v.kind == "ablation"))
        if lines:
            title = f"linear probe of block {c.probe.block}, null class, {c.probe.score_on} split, {weights} weights"
            draw_lines(
                lines, out / "probe.png", "position in the sequence", "top-1 accuracy (%)", title, ticks=lines[0].xs
            )
            written.append(out / "probe.png")
        lines, metric = [], ""
        for variant, v in c.variants.items():
            curves = self.of(variant, lambda r: r["curve"]).values()
            steps = sorted({int(s) for curve in curves for s in curve if "score" in curve[s]})
            ys = [[score_at(curve, s, split) for s in steps] for curve in curves if curve]
            if steps and ys:
                images = [s * c.base.train.global_batch for s in steps]
                lines.append(Line(self.labels[variant], images, ys, thin=v.kind == "ablation"))
                metric = next(r["score"][split]["metric"] for curve in curves for r in curve.values() if "score" in r)
        if lines:
            title = f"{c.curve.count} pictures against the {split} split, {weights} weights"
            draw_lines(lines, out / "score.png", "images seen", metric, title)
            written.append(out / "score.png")
        return written


def score_at(curve: Mapping[str, Any], step: int, split: str) -> float:
    """NaN where it is not measured yet."""
    try:
        return curve[str(step)]["score"][split]["value"]
    except KeyError:
        return math.nan


def shown(s: Mapping[str, Any], sign: str = "") -> str:
    """4.31 ± 0.02; one seed says so."""
    digits = 3 if abs(s["mean"]) < 10 else 2
    mean = f"{s['mean']:{sign}.{digits}f}"
    return f"{mean} (1 seed)" if s["std"] is None else f"{mean} ± {s['std']:.{digits}f}"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])
