"""Names of the files in a run folder and in a checkpoint."""

from __future__ import annotations

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
LEASE, LOCK = "lease.json", ".lock"  # of the process that writes into the folder
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
HEARTBEATS = "heartbeats"
STACKS, LOST = "stacks", "lost.jsonl"
SKIPPED = "skipped.jsonl"
TRACKERS = "trackers.json"  # the run's identity for each tracker
PROFILE = "profile"
ROLLBACKS = "rollbacks.jsonl"
EVALUATIONS, EVALUATING = "evaluations.jsonl", "evaluating.json"  # scores while training; the one under way
MANIFEST = "megastar.json"  # of a checkpoint
FORMAT = 2  # of a checkpoint
VISIBLE_WITHIN = 90.0  # seconds that another node's file may take to appear; clients of NFS keep what they know of a folder for up to 60
