"""The names of the experiment trackers, for ``trackers`` of a run and of a tokenizer's training."""

from __future__ import annotations

TRACKER_NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
TRACKERS_HELP = (
    "where the main rank also sends rows, events and sample grids: any of tensorboard, wandb, trackio and mlflow; []: "
    "metrics.jsonl and events.jsonl only (docs/trackers.md)"
)
