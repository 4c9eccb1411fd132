"""Weights & Biases: offline unless WANDB_MODE says otherwise, in RUN/wandb."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastar.engine.metrics.trackers.tracker import PROJECT, TrackedRun, Tracker

OFFLINE = "offline"


class WandbTracker(Tracker):
    """``step`` is the x-axis of all metrics, so that steps repeated by a resumed run are recorded."""

    def start(self, run: TrackedRun) -> None:
        import wandb

        self._wandb: Any = wandb
        mode = os.environ.get("WANDB_MODE") or OFFLINE
        found = run.identity("wandb", lambda: {"id": secrets.token_hex(8)})
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=found["id"],
            resume=None if mode == OFFLINE else "allow",
            mode=mode,
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            config=dict(run.config),
            allow_val_change=True,  # some fields may change on resume
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def event(self, step: int, kind: str, text: str) -> None:
        self._run.log({"step": step, f"events/{kind}": text})

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path), caption=caption)})

    def finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
