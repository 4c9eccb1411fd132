"""The whole network on each rank, from the shards of the student's weights or of their average."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.checkpoint.shard_format import PREFIX
from megastar.config.schema import ModelConfig
from megastar.engine.context import Context
from megastar.engine.phase import EVALUATION, PHASE
from megastar.engine.zero.engines import Engines, full_shapes, owned
from megastar.engine.zero.partitions import Shard
from megastar.model.io import build_model
from megastar.model.transformer import Transformer
from megastar.parallel.plan import split_of
from megastar.parallel.tensor_hash import hash_tensor


class WholeWeights:
    """Reads the weights ``kind``, "ema" or "student", of the engines; changes nothing there."""

    def __init__(self, engines: Engines, ctx: Context, kind: str):
        self.ctx, self.kind = ctx, "ema" if kind == "ema" else "fp32"
        shapes = full_shapes(engines, ctx)
        self.shapes = {n.removeprefix(PREFIX): tuple(s) for n, s in shapes.items() if n.startswith(PREFIX)}
        self.mine: dict[str, list[Shard]] = defaultdict(list)
        for shard in owned(engines, ctx):
            self.mine[shard.name.removeprefix(PREFIX)].append(shard)

    def reserve(self, dtype: torch.dtype) -> None:
        """Allocate and free what the network takes: the collectives that follow must not fail on one rank alone."""
        numbers = [math.prod(shape) for shape in self.shapes.values()]
        size = sum(numbers) * dtype.itemsize + 3 * 4 * max(numbers)
        del_me = torch.empty(size, dtype=torch.uint8, device=self.ctx.device)
        del del_me

    def read(self, name: str) -> Tensor:
        """The whole fp32 weight on this rank's device. A collective of all ranks."""
        PHASE.at(EVALUATION)
        shape = self.shapes[name]
        split = split_of(name) if self.ctx.tensor > 1 else None
        parts = self.ctx.tensor if split else 1
        whole = torch.zeros(parts, math.prod(shape) // parts, device=self.ctx.device)
        row = whole[self.ctx.mesh.tensor_rank if split else 0]
        for shard in self.mine[name]:
            row[shard.start : shard.stop].copy_(shard.view(self.kind))
        if self.ctx.world > 1:  # each element has one owner, so the sum is exact
            dist.all_reduce(whole)
        if split is None:
            return whole.view(shape)
        return split.join([part.view(split.local_shape(shape, parts)) for part in whole])

    @torch.no_grad()
    def network(self, cfg: ModelConfig, dtype: torch.dtype) -> tuple[Transformer, str]:
        """The network in ``dtype``, and a digest of its fp32 weights on rank 0 (empty on the others). A collective."""
        digest = hashlib.sha256()

        def read(name: str) -> Tensor:
            found = self.read(name)
            if self.ctx.main:
                digest.update(f"{name} {int(hash_tensor(found))}\n".encode())
            return found

        net = build_model(cfg, list(self.shapes), read, self.ctx.device, dtype)
        return net, digest.hexdigest()[:32] if self.ctx.main else ""
