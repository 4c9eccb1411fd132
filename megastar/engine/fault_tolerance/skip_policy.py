"""Which steps are skipped, and when skipping is not enough (docs/faults.md).

A step is skipped on all ranks when its loss or gradient is not finite, or its loss is a spike. More than
``faults.max_skips`` of them within ``faults.spike_window`` steps cause a rollback (rollback.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megastar.config.schema import FaultsConfig
from megastar.data.shards.reader import ShardSet
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.loss_spikes import SpikeTest
from megastar.engine.fault_tolerance.step_consensus import ConsensusResult
from megastar.engine.rank_sync import gather
from megastar.run_dir.events import time_and_job
from megastar.run_dir.layout import SKIPPED
from megastar.utils.files import append_line
from megastar.utils.hostname import host_name

NONFINITE_LOSS, NONFINITE_GRADIENT = "the loss is not finite", "the gradient is not finite"


@dataclass
class StepRecord:
    """One step's micro-batches on this rank, and the results that all ranks share."""

    results: list[ConsensusResult] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    skip_reason: str = ""  # empty: the step was taken

    def add(self, result: ConsensusResult, metrics: dict[str, Tensor], ids: Tensor) -> None:
        self.results.append(result)
        self.metrics.append({name: value.detach() for name, value in metrics.items()})
        self.ids.append(ids)

    def skip(self, reason: str) -> None:
        """The first reason is kept; an empty one changes nothing."""
        self.skip_reason = self.skip_reason or reason

    @property
    def loss(self) -> float:
        """The step's mean over all ranks and micro-batches."""
        return math.fsum(r.loss for r in self.results) / len(self.results)

    @property
    def signal(self) -> int:
        """The stop signal, 0 for none."""
        return self.results[-1].signal

    @property
    def save_failed(self) -> bool:
        """Whether a save failed on some rank."""
        return any(r.save_failed for r in self.results)

    def means(self) -> dict[str, Tensor]:
        """Each metric's mean over the micro-batches of this rank that have it; the last one has all."""
        found = {name: [m[name].float() for m in self.metrics if name in m] for name in self.metrics[-1]}
        return {name: sum(values, start=torch.zeros(())) / len(values) for name, values in found.items()}


class SkipPolicy:
    """Decides which steps are skipped, on all ranks alike; ``state`` is part of each checkpoint.

    ``offset``: step k trains on the batch of position k + offset in the data's order. ``rollbacks``: of the run so far.
    ``skips``: the skipped steps among the last ``spike_window``.
    """

    def __init__(self, faults: FaultsConfig, rollbacks: int = 0):
        self.faults, self.rollbacks, self.offset = faults, rollbacks, 0
        self.skips: list[int] = []
        self.spikes = SpikeTest(faults.spike_sigma, faults.spike_window)

    def state(self, step: int) -> dict[str, Any]:
        """After ``step`` steps."""
        self._forget(step)
        losses, skips = list(self.spikes.losses), list(self.skips)
        return {"losses": losses, "skips": skips, "rollbacks": self.rollbacks, "offset": self.offset}

    def restore(self, metadata: dict[str, Any], rollbacks: int = 0, position: int = 0) -> None:
        """Continue after a checkpoint with the manifest ``metadata``. ``rollbacks``: of the run so far, after the last of
        which it continued at ``position`` in the data; the checkpoint may be older than that."""
        state = metadata.get("guard", {})
        self.rollbacks, self.offset = state.get("rollbacks", 0), state.get("offset", 0)
        self.skips = list(state.get("skips", []))
        self.spikes = SpikeTest(self.faults.spike_sigma, self.faults.spike_window, state.get("losses", []))
        if rollbacks > self.rollbacks:
            self.rollbacks, self.skips, self.offset = rollbacks, [], position - metadata["step"]

    def reason_to_skip(self, record: StepRecord) -> str:
        """What is wrong with a step whose backward passes are done; empty: nothing."""
        return self.spikes.check(record.loss) if all(r.finite for r in record.results) else NONFINITE_LOSS

    def accept(self, record: StepRecord) -> None:
        self.spikes.add(record.loss)

    def skip(self, step: int) -> bool:
        """Count ``step`` (steps done before it) as skipped; returns whether it is one too many."""
        self._forget(step)
        self.skips.append(step)
        return len(self.skips) > self.faults.max_skips

    def _forget(self, step: int) -> None:
        self.skips = [s for s in self.skips if s > step - self.faults.spike_window]


def record_skip(
    ctx: Context, run: Path, policy: SkipPolicy, shards: ShardSet, record: StepRecord, step: int
) -> tuple[dict[str, Any], str]:
    """Append the skipped ``step`` and its batch to skipped.jsonl; returns the row and a message. A collective."""
    broken = [name for name in record.metrics[0] if not all(torch.isfinite(m[name]).all() for m in record.metrics)]
    mine: dict[str, Any] = {"rank": ctx.rank, "host": host_name(), "broken": broken}
    if ctx.mesh.tensor_rank == 0:  # the ranks of a tensor group see one batch
        mine["ids"] = torch.cat(record.ids).tolist()
    every = gather(ctx, mine)
    reason, ids = record.skip_reason, [i for each in every for i in each.get("ids", [])]
    row: dict[str, Any] = {**time_and_job(), "step": step, "position": step + policy.offset, "why": reason}
    if reason != NONFINITE_LOSS:
        row["loss"] = record.loss
    if len(policy.spikes.losses) > 1:
        row["mean"], row["sigma"] = policy.spikes.baseline()
    row |= {"suspects": suspects(every), "hosts": len({each["host"] for each in every})}
    row |= {"shards": shards_of(shards, ids), "ids": ids}
    if ctx.main:
        with suppress(OSError):  # a disk error does not stop the run
            append_line(run / SKIPPED, json.dumps(row))
    names = row["shards"]
    places = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ranks = f" on {name_ranks(row['suspects'])}" if row["suspects"] else ""
    return row, f"step {step}: skipped, {reason}{ranks}; the batch's {len(ids)} ids ({places}) are in {run / SKIPPED}"


def suspects(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks, with their hosts, whose losses are not finite; empty where all ranks' are alike.

    The contrastive losses depend on all ranks' teacher features: only the other parts show the origin.
    """
    own = [e for e in every if {"loss_ar", "loss_mim", "loss_repa"} & set(e["broken"])] or [
        e for e in every if e["broken"]
    ]
    return [{"rank": e["rank"], "host": e["host"]} for e in own] if len(own) < len(every) else []


def name_ranks(whose: Iterable[dict[str, Any]]) -> str:
    """ "rank 3 (node7), rank 5 (node8)"."""
    return ", ".join(f"rank {w['rank']} ({w['host']})" for w in whose)


def shards_of(shards: ShardSet, ids: list[int]) -> list[str]:
    """Names of the shards that hold the samples."""
    places = np.unique(np.searchsorted(shards.starts, np.asarray(ids, np.int64), side="right") - 1)
    return [shards.manifest.shards[p].name for p in places]
