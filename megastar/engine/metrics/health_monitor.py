"""Warnings about the training itself, as soon as a row of metrics shows a problem."""

from __future__ import annotations

from megastar.config.schema import RunConfig
from megastar.engine.metrics.logger import MetricsLogger
from megastar.run_dir import training_checks
from megastar.run_dir.training_checks import FIRST, KEPT


class HealthMonitor:
    """Warns at the start of what is known then, and after each row of new problems; again only after one was over."""

    def __init__(self, cfg: RunConfig, ranks: int, steps: int, metrics: MetricsLogger):
        self.cfg, self.metrics, self.images = cfg, metrics, training_checks.contrastive_images(cfg, ranks)
        self.rows = (
            training_checks.training_rows(training_checks.read_rows(metrics.folder)) if metrics.active else []
        )  # of a resumed run
        self.present: set[str] = set()
        for kind, text in training_checks.problems_at_start(cfg, self.images, steps).items():
            metrics.event("warning", text, about=kind)

    def update(self, step: int, row: dict[str, float]) -> None:
        """``row`` of metrics after ``step`` steps; empty where none is due."""
        if not row or not self.metrics.active:
            return
        rows = [r for r in self.rows if r["step"] < step]  # a run that rolled back repeats steps
        rows.append({"step": step, **row})
        self.rows = rows[:FIRST] + rows[FIRST:][-KEPT:]
        problems = training_checks.find_problems(self.cfg, self.images, self.rows)
        for kind, text in problems.items():
            if kind not in self.present:
                self.metrics.event("warning", text, about=kind)
        self.present = set(problems)
