"""Checkpoints in the memory of the nodes: each rank's files on its own node, and copies on other nodes.

Every ``faults.memory_every`` steps the ranks copy their state to host memory; a thread writes it to the node's folder
(node_memory.py) and sends it to a rank of each of the next ``faults.memory_copies`` nodes. A generation is complete
when every rank has reported that its files are; only then is the previous generation removed, so there are at most two.
After a loss, the remaining nodes select the newest generation whose files they hold together, exchange the missing
files, and load it like any checkpoint, on any number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megastar.checkpoint.rng_state import random_file
from megastar.checkpoint.shard_format import state_file
from megastar.config.schema import RunConfig
from megastar.engine.checkpointer.async_saver import SLACK, as_os_error, gib
from megastar.engine.checkpointer.snapshot import Snapshot, Snapshots
from megastar.engine.context import Context
from megastar.engine.elastic.node_memory import VARIABLE
from megastar.engine.elastic.transfer import exchange
from megastar.engine.phase import PHASE, SAVING, STARTING
from megastar.engine.rank_sync import from_main, gather
from megastar.engine.zero.engines import Engines, full_shapes, owned, stored_of
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.checkpoint_dir import name_of
from megastar.run_dir.layout import MANIFEST
from megastar.utils.files import sha256, write_atomic

logger = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds


def peers_of(nodes: list[int], copies: int = 1) -> list[list[int]]:
    """For each rank the ranks that keep its copies: one of each of the next nodes, at most all other nodes."""
    order = sorted(set(nodes))
    ranks = {node: [r for r, n in enumerate(nodes) if n == node] for node in order}
    found: list[list[int]] = []
    for rank, node in enumerate(nodes):
        place, after = order.index(node), range(1, 1 + min(copies, len(order) - 1))
        holders = [ranks[order[(place + k) % len(order)]] for k in after]
        found.append([of[ranks[node].index(rank) % len(of)] for of in holders])
    return found


def note_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def files_of(rank: int, tensor: int) -> list[str]:
    """The files of a rank: its state, the random state of a data rank, and last the note that describes both."""
    random = [] if rank % tensor else [random_file(rank // tensor)]
    return [state_file(rank), *random, note_file(rank)]


class MemoryCheckpoints:
    """Constructed on all ranks. Disabled if ``faults.memory_every`` is 0 or no elastic agent started the ranks."""

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines):
        self.every, self.ctx = cfg.faults.memory_every, ctx
        self.folder = Path(os.environ.get(VARIABLE, ""))
        self.problem = ""  # of the last generation
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.kept: list[str] = []  # names of the generations in memory, oldest first
        if not (self.every and VARIABLE in os.environ):
            if self.every and ctx.main:
                logger.warning("faults.memory_every = %d has no effect without megastar elastic", self.every)
            self.every = 0
            return
        self.nodes = [int(n) for n in gather(ctx, os.environ.get("GROUP_RANK", "0"))]
        self.leaders = {self.nodes.index(n) for n in self.nodes}  # the first rank of each node
        self.peers = peers_of(self.nodes, cfg.faults.memory_copies)
        self.sources = [r for r, peers in enumerate(self.peers) if ctx.rank in peers]
        self.group = dist.new_group(backend="gloo") if ctx.world > 1 else None
        self.snapshots = Snapshots(cfg, ctx, engines, full_shapes(engines, ctx))
        self.token = from_main(ctx, secrets.token_hex(4))
        size = 4 * stored_of(owned(engines, ctx)) + SLACK
        self._check_space(gather(ctx, size))

    def _check_space(self, sizes: list[int]) -> None:
        """Disable the feature unless two generations fit, of a node's ranks and of those that it keeps copies of."""
        ctx = self.ctx
        mine = [r for r, n in enumerate(self.nodes) if n == self.nodes[ctx.rank]]
        need = 2 * sum(sizes[r] for r in mine) + 2 * sum(
            sizes[r] for r, ps in enumerate(self.peers) for p in ps if p in mine
        )
        there = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.folder).free + there
        short = f"{self.folder.parent} of node {self.nodes[ctx.rank]} has {gib(free)} free" if free < need else ""
        if problem := next(filter(None, gather(ctx, short)), ""):
            self.every, self.problem = 0, f"{problem}, two generations need {gib(need)}: faults.memory_every is off"
            if ctx.main:
                logger.warning(self.problem)

    # Save --------------------------------------------------------------------------------------------------------
    def save(self, step: int, metadata: dict[str, Any]) -> float | None:
        """Save if a generation is due after ``step`` steps; returns the seconds that it blocked. All ranks call it."""
        if not self.every or step % self.every:
            return None
        start = time.perf_counter()
        PHASE.at(SAVING)
        self._settle()
        snapshot, name = self.snapshots.take(step, metadata), f"{name_of(step)}-{self.token}"
        self.kept.append(name)
        self.thread = threading.Thread(target=self._write, args=(name, snapshot), name="memory checkpoint", daemon=True)
        self.thread.start()
        return time.perf_counter() - start

    def _write(self, name: str, snapshot: Snapshot) -> None:
        """Runs in the thread. ``error`` is set if a rank cannot be reached or the memory is full."""
        ctx, folder = self.ctx, self.folder / name
        try:
            files = snapshot.write(folder, ctx)
            note = {"manifest": snapshot.manifest, "files": files}
            write_atomic(folder / note_file(ctx.rank), json.dumps(note).encode())
            self._exchange(folder)
        except Exception as error:  # of any kind: a failed copy must not end the run
            self.error = error

    def _exchange(self, folder: Path) -> None:
        tensor, own = self.ctx.tensor, [folder / f for f in files_of(self.ctx.rank, self.ctx.tensor)]
        send = dict.fromkeys(self.peers[self.ctx.rank], own)
        receive = {r: [folder / f"{f}.part" for f in files_of(r, tensor)] for r in self.sources}
        if self.group is not None and (send or receive):
            exchange(self.group, send, receive)
        for source in self.sources:
            accept(folder, source, tensor)

    def _settle(self) -> None:
        """Wait for the generation in progress: keep it, if it is complete on all ranks, or else the previous one."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        problems = gather(self.ctx, "" if self.error is None else str(as_os_error(self.error)))
        self.error = None
        before, self.problem = self.problem, next(filter(None, problems), "")
        if self.problem and not before and self.ctx.main:
            logger.warning("the checkpoint in memory could not be written (%s); training continues", self.problem)
        self._keep(self.kept[:-1] if self.problem else self.kept[-1:])

    def _keep(self, names: list[str]) -> None:
        self.kept = names
        if self.every and self.ctx.rank in self.leaders:
            for path in self.folder.glob("step-*"):
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)

    def discard(self) -> None:
        """Remove all generations: the run has ended or was rolled back."""
        self.close()
        self._keep([])

    def close(self) -> None:
        if self.thread is not None:
            self.thread.join(PATIENCE)  # it may wait for a rank that is lost
            self.thread = None

    # Load --------------------------------------------------------------------------------------------------------
    def newest(self, disk: Path | None, rollbacks: int) -> Path | None:
        """The newest complete generation after ``disk``, as a checkpoint on this node; else ``disk``. A collective."""
        if not self.every:
            return disk
        PHASE.at(STARTING)
        here = [r for r, n in enumerate(self.nodes) if n == self.nodes[self.ctx.rank]]
        mine = inventory(self.folder, here.index(self.ctx.rank), len(here))
        holders: dict[
            str, dict[int, set[int]]
        ] = {}  # generation -> rank that wrote -> leaders of the nodes that have its files
        for rank, there in enumerate(gather(self.ctx, mine)):
            for name, whose in there.items():
                for r in whose:
                    holders.setdefault(name, {}).setdefault(r, set()).add(self.nodes.index(self.nodes[rank]))
        on_disk = checkpoint_dir.step_in(disk) if disk else -1
        for name in sorted(holders, reverse=True):
            if checkpoint_dir.step_in(Path(name.rpartition("-")[0])) <= on_disk:
                break
            if not (problem := self._collect(name, dict(sorted(holders[name].items())), rollbacks)):
                self._keep([name])
                return self.folder / name
            if self.ctx.main:
                logger.warning("the checkpoint %s in memory is not used: %s", name, problem)
        self._keep([])
        return disk

    def _collect(self, name: str, holders: dict[int, set[int]], rollbacks: int) -> str:
        """Copy all files of a generation to each node; returns the problem, or "", the same on all ranks."""
        ctx, folder, (first, having) = self.ctx, self.folder / name, next(iter(holders.items()))
        note = json.loads((folder / note_file(first)).read_text()) if ctx.rank == min(having) else {}
        manifest: dict[str, Any] = gather(ctx, note.get("manifest", {}))[min(having)]
        ranks = range(manifest["mesh"]["data"] * manifest["mesh"]["tensor"])
        if missing := [r for r in ranks if r not in holders]:
            return f"no remaining node has the files of rank {missing[0]}"
        if manifest.get("guard", {}).get("rollbacks", 0) != rollbacks:
            return "it is from before a rollback"
        problem = ""
        try:
            if ctx.rank in self.leaders:
                folder.mkdir(mode=0o700, exist_ok=True)
                self._fetch(folder, holders, manifest["mesh"]["tensor"])
                notes = [json.loads((folder / note_file(rank)).read_text()) for rank in ranks]
                files = {name: entry for note in notes for name, entry in note["files"].items()}
                whole = manifest | {"files": dict(sorted(files.items()))}
                write_atomic(folder / MANIFEST, json.dumps(whole).encode())
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"rank {ctx.rank}: {error}"
        return next(filter(None, gather(ctx, problem)), "")

    def _fetch(self, folder: Path, holders: dict[int, set[int]], tensor: int) -> None:
        """Transfer one rank's files after another, in the same order on all nodes; separate pairs run concurrently."""
        for rank, having in holders.items():
            names = files_of(rank, tensor)
            for lacking in sorted(self.leaders - having):
                if self.ctx.rank == min(having):
                    exchange(self.group, {lacking: [folder / f for f in names]}, {})
                elif self.ctx.rank == lacking:
                    exchange(self.group, {}, {min(having): [folder / f"{f}.part" for f in names]})
                    accept(folder, rank, tensor)


def accept(folder: Path, rank: int, tensor: int) -> None:
    """Rename the received files of ``rank`` if their hashes match its note. Raises ``ValueError`` otherwise."""
    names = files_of(rank, tensor)
    note = json.loads((folder / f"{names[-1]}.part").read_text())
    for name in names[:-1]:
        if sha256(folder / f"{name}.part") != note["files"][name]["sha256"]:
            raise ValueError(f"{name} of rank {rank} arrived damaged")
    for name in names:  # the note last: it marks the files as complete
        (folder / f"{name}.part").replace(folder / name)


def inventory(folder: Path, part: int, parts: int) -> dict[str, list[int]]:
    """Generation -> the ranks whose files in this node's memory are intact; ``parts`` ranks share the hashing."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("step-*-*/rank-*.json"))[part::parts]:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            files = json.loads(path.read_text())["files"]
            if all(sha256(path.parent / name) == entry["sha256"] for name, entry in files.items()):
                found.setdefault(path.parent.name, []).append(int(path.stem.removeprefix("rank-")))
    return found
