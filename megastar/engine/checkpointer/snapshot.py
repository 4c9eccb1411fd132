"""A copy of this rank's state in host memory, and the files of a checkpoint that are written from it."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.checkpoint.rng_state import random_file
from megastar.checkpoint.shard_format import Piece, state_file, write_pieces
from megastar.config.env_text import recorded
from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.zero.engines import Engines, owned, stored_of
from megastar.parallel.plan import split_of
from megastar.run_dir.layout import FORMAT
from megastar.utils.device import pinned_buffer
from megastar.utils.files import sha256


@dataclass
class Snapshot:
    """What this rank writes into a checkpoint, and the checkpoint's manifest without its files."""

    pieces: list[tuple[Piece, dict[str, Tensor]]]
    random: dict[str, Tensor]
    manifest: dict[str, Any]

    def write(self, folder: Path, ctx: Context) -> dict[str, Any]:
        """Write this rank's files into ``folder``; returns their entries of the manifest."""
        mesh = ctx.mesh
        folder.mkdir(parents=True, exist_ok=True)  # another node may not see it yet
        size, digest = write_pieces(folder / state_file(mesh.rank), self.pieces)
        whose = f"rank {mesh.rank}: data rank {mesh.data_rank}, tensor rank {mesh.tensor_rank}"
        files = {state_file(mesh.rank): {"bytes": size, "sha256": digest, "whose": whose}}
        if mesh.tensor_rank == 0:
            file = folder / random_file(mesh.data_rank)
            data = io.BytesIO()  # torch.save to a file would hide the disk's error
            torch.save(self.random, data)
            with file.open("wb") as f:
                f.write(data.getvalue())
                f.flush()
                os.fsync(f.fileno())
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file), "whose": whose}
        return files


class Snapshots:
    """Copies into one host buffer, pinned for a GPU and reused by each copy: a snapshot is valid until the next."""

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines, shapes: dict[str, Any]):
        self.cfg, self.ctx, self.engines, self.shapes = cfg, ctx, engines, shapes
        self.host: Tensor | None = None

    def take(self, step: int, metadata: dict[str, Any]) -> Snapshot:
        """Copy this rank's state after ``step`` steps. A collective in a tensor group."""
        align_replicas(self.engines, self.ctx)
        mine = owned(self.engines, self.ctx)
        pieces = self._copy(mine, stored_of(mine))
        random = {"torch": torch.get_rng_state()}  # all other draws are functions of the seed and the step
        if self.ctx.device.type == "cuda":
            torch.cuda.synchronize()
            random["cuda"] = torch.cuda.get_rng_state(self.ctx.device)
        stage = self.engines.student.zero_optimization_stage()
        manifest = {
            "format": FORMAT,
            "step": step,
            **metadata,
            "mesh": {"data": self.ctx.mesh.data, "tensor": self.ctx.tensor, "zero_stage": stage},
            "dtype": str(self.ctx.dtype),
            "optimizer": self.engines.optimizer.name,
            "optimizer_step": self.engines.updates(),
            "parameters": self.shapes,
            "config": recorded(asdict(self.cfg)),
        }
        return Snapshot(pieces, random, manifest)

    def _copy(self, mine: list[Any], elements: int) -> list[tuple[Piece, dict[str, Tensor]]]:
        """This rank's states in one host buffer."""
        if self.host is None or self.host.numel() < elements:
            cuda = self.ctx.device.type == "cuda"
            self.host = None  # freed before its successor is allocated
            self.host = pinned_buffer(elements) if cuda else torch.empty(elements, dtype=torch.float32)
        offset, pieces = 0, []
        for shard in mine:
            rank = self.ctx.mesh.tensor_rank if split_of(shard.name) else 0
            copies = {}
            for kind in shard.kinds:
                copies[kind] = self.host.narrow(0, offset, shard.stop - shard.start)
                copies[kind].copy_(shard.view(kind), non_blocking=True)
                offset += shard.stop - shard.start
            pieces.append((Piece(shard.name, rank, shard.start, shard.stop, shard.kinds), copies))
        return pieces


@torch.no_grad()
def align_replicas(engines: Engines, ctx: Context) -> None:
    """Copy tensor rank 0's values of the weights that each rank holds whole to all ranks of a tensor group.

    Their gradients are the same sum, but reduced in different groups, which may round differently: without this they
    would drift apart, and a checkpoint would combine parts of different replicas.
    """
    if ctx.tensor_group is None:
        return
    source = ctx.mesh.rank - ctx.mesh.tensor_rank
    for shard in engines.shards():
        if not split_of(shard.name):
            for kind in shard.kinds:
                view = shard.view(kind)
                value = view.to(ctx.device)
                dist.broadcast(value, src=source, group=ctx.tensor_group)
                if value is not view:
                    view.copy_(value)
    engines.publish_masters()
