"""Steps that would do harm: which are skipped, and when skipping is not enough (docs/faults.md).

A step is skipped on all ranks when its loss or gradient is not finite, or its loss is a spike. After more than
``faults.max_skips`` of them within ``faults.spike_window`` steps the run goes back (rollback.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megastar.config.schema import FaultsConfig
from megastar.data.shards.reader import ShardSet
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.loss_spikes import SpikeTest
from megastar.engine.fault_tolerance.step_consensus import ConsensusResult
from megastar.engine.metrics.logger import MetricsLogger
from megastar.run_dir.layout import SKIPPED
from megastar.utils.clock import utc_now
from megastar.utils.files import append_line
from megastar.utils.hostname import host_name

NONFINITE_LOSS, NONFINITE_GRADIENT = "the loss is not finite", "the gradient is not finite"


@dataclass
class StepRecord:
    """One step's micro-batches on this rank, and what all ranks said of them."""

    words: list[ConsensusResult] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def add(self, word: ConsensusResult, parts: dict[str, Tensor], ids: Tensor) -> None:
        self.words.append(word)
        self.parts.append({name: value.detach() for name, value in parts.items()})
        self.ids.append(ids)

    @property
    def loss(self) -> float:
        """The step's mean over all ranks and micro-batches."""
        return math.fsum(w.loss for w in self.words) / len(self.words)

    @property
    def signal(self) -> int:
        """The stop signal, if any."""
        return self.words[-1].signal

    @property
    def lost(self) -> bool:
        """Whether some rank has something to settle about a save."""
        return any(w.lost for w in self.words)

    def sums(self) -> dict[str, Tensor]:
        """The mean of each metric on this rank."""
        n = len(self.parts)
        return {name: sum((p[name].float() for p in self.parts), start=0) / n for name in self.parts[0]}  # type: ignore[misc]


class SkipPolicy:
    """What must be known to decide, the same on all ranks; ``state`` goes into each checkpoint.

    ``offset``: step k trains on the batch of place k + offset in the data's order. ``rollbacks``: how often this run
    went back. ``skips``: the skipped steps of the last ``spike_window``.
    """

    def __init__(self, faults: FaultsConfig, rollbacks: int = 0):
        self.faults, self.rollbacks, self.offset = faults, rollbacks, 0
        self.skips: list[int] = []
        self.spikes = SpikeTest(faults.spike_sigma, faults.spike_window)

    def state(self, step: int) -> dict[str, Any]:
        """After ``step`` steps."""
        self._forget(step)
        return {
            "losses": list(self.spikes.losses),
            "skips": list(self.skips),
            "rollbacks": self.rollbacks,
            "offset": self.offset,
        }

    def restore(self, about: dict[str, Any], rollbacks: int = 0, position: int = 0) -> None:
        """Go on behind a checkpoint with the manifest ``about``. ``rollbacks``: how often the run went back, the last
        time to go on at ``position`` in the data; the checkpoint may be from before that."""
        state = about.get("guard", {})
        self.rollbacks, self.offset = state.get("rollbacks", 0), state.get("offset", 0)
        self.skips = list(state.get("skips", []))
        self.spikes = SpikeTest(self.faults.spike_sigma, self.faults.spike_window, state.get("losses", []))
        if rollbacks > self.rollbacks:
            self.rollbacks, self.skips, self.offset = rollbacks, [], position - about["step"]

    def judge(self, seen: StepRecord) -> str:
        """What is wrong with a step whose backward passes are done, or nothing."""
        return self.spikes.check(seen.loss) if all(w.finite for w in seen.words) else NONFINITE_LOSS

    def accept(self, seen: StepRecord) -> None:
        self.spikes.add(seen.loss)

    def skip(self, step: int) -> bool:
        """Count ``step`` (steps done before it) as skipped; True: that is one too many."""
        self._forget(step)
        self.skips.append(step)
        return len(self.skips) > self.faults.max_skips

    def _forget(self, step: int) -> None:
        self.skips = [s for s in self.skips if s > step - self.faults.spike_window]


def record_skip(
    ctx: Context, metrics: MetricsLogger, guard: SkipPolicy, shards: ShardSet, seen: StepRecord, step: int, why: str
) -> dict[str, Any]:
    """Put the skipped ``step`` and its batch on record, in RUN/skipped.jsonl and as an event. Called by all ranks."""
    broken = [name for name in seen.parts[0] if not all(torch.isfinite(p[name]).all() for p in seen.parts)]
    mine: dict[str, Any] = {"rank": ctx.rank, "host": host_name(), "broken": broken}
    if ctx.mesh.tensor_rank == 0:  # the ranks of a tensor group see one batch
        mine["ids"] = torch.cat(seen.ids).tolist()
    every = [mine]
    if ctx.world > 1:
        every = [{}] * ctx.world
        dist.all_gather_object(every, mine)
    whose = suspects(every)
    ids = [i for each in every for i in each.get("ids", [])]
    row: dict[str, Any] = {**stamp(), "step": step, "position": step + guard.offset, "why": why}
    if why != NONFINITE_LOSS:
        row["loss"] = seen.loss
    if len(guard.spikes.losses) > 1:
        row["mean"], row["sigma"] = guard.spikes.baseline()
    hosts = len({each["host"] for each in every})
    row |= {"suspects": whose, "hosts": hosts, "shards": shards_of(shards, ids), "ids": ids}
    if ctx.main:
        folder = metrics.folder
        with suppress(OSError):  # a disk that takes none is no reason to stop
            append_line(folder / SKIPPED, json.dumps(row))
        names = row["shards"]
        places = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        ranks = f" on {said(whose)}" if whose else ""
        text = f"step {step}: skipped, {why}{ranks}; the batch's {len(ids)} ids ({places}) are in {folder / SKIPPED}"
        metrics.event("skipped", text, skipped=step, why=why, suspects=whose)
    return row


def suspects(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks, with their hosts, that losses not finite came from; nobody where all are alike.

    The contrastive losses see all ranks' teacher features: only the other parts tell whose they are.
    """
    own = [e for e in every if {"loss_ar", "loss_mim"} & set(e["broken"])] or [e for e in every if e["broken"]]
    return [{"rank": e["rank"], "host": e["host"]} for e in own] if len(own) < len(every) else []


def said(whose: Iterable[dict[str, Any]]) -> str:
    """ "rank 3 (node7), rank 5 (node8)"."""
    return ", ".join(f"rank {w['rank']} ({w['host']})" for w in whose)


def shards_of(shards: ShardSet, ids: list[int]) -> list[str]:
    """Names of the shards that hold the samples."""
    places = np.unique(np.searchsorted(shards.starts, np.asarray(ids, np.int64), side="right") - 1)
    return [shards.manifest.shards[p].name for p in places]


def stamp() -> dict[str, Any]:
    """When, and in which job."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"time": utc_now()} | ({"job": job} if job else {})


def read_skips(folder: Path) -> list[dict[str, Any]]:
    from megastar.run_dir.jsonl import read_jsonl

    return [r for r in read_jsonl(folder / SKIPPED) if "step" in r]
