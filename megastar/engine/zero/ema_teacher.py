"""The teacher's compute copy, partitioned as the student's weights are, and its refresh from the EMA shards.

The EMA itself is a state of the student's optimizer (partitions.py). At ZeRO stage 3 the copy is sharded too, and each
rank copies its own shard without communication. At stages 0 to 2 it is replicated as the student's compute copy is, and
one all-gather per step collects the shards, as DeepSpeed does for the student.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megastar.engine.zero.partitions import AdamWEMA, Shard, gather_partitions, shards
from megastar.engine.zero.streams import gather_after_updates

PREFIX = "transformer."  # the teacher is the student's transformer, without the projector


class ShardedTeacher:
    """A second ZeRO-3 engine without an optimizer."""

    def __init__(self, engine: Any, student: Any, optimizer: AdamWEMA):
        self.engine, self.module = engine, engine.module
        targets = {PREFIX + n: q for n, q in self.module.named_parameters()}
        self.pairs: list[tuple[Shard, Tensor]] = []
        for shard in shards(student, optimizer):
            if shard.name in targets:
                q = targets.pop(shard.name)
                assert q.ds_shape == torch.Size(shard.shape) and q.ds_persist is False, shard.name
                self.pairs.append((shard, q.ds_tensor))
        # A rank may have no part of a parameter smaller than the number of ranks.
        assert all(q.ds_numel < q.ds_tensor.numel() * student.dp_world_size for q in targets.values()), list(targets)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    @torch.no_grad()
    def refresh(self) -> None:
        for shard, target in self.pairs:
            source = shard.view("ema")
            target.data.view(-1)[: len(source)].copy_(source)
        gather_after_updates(self.engine)


class ReplicatedTeacher:
    """A module whose parameters are views of flat buffers with the layout of the student's ZeRO groups."""

    def __init__(self, module: nn.Module, student: Any, optimizer: AdamWEMA):
        self.module, self.zero = module, student.optimizer
        self.stage = student.zero_optimization_stage()
        mine = dict(module.named_parameters())
        names = {p: n for n, p in student.module.named_parameters()}
        self.buffers: list[tuple[int, Tensor]] = []  # (group, flat)
        self.pairs: list[tuple[Shard, Tensor]] = []
        if self.stage == 0:
            found = [s for s in shards(student, optimizer) if s.name.startswith(PREFIX)]
            self.pairs = [(s, mine[s.name.removeprefix(PREFIX)].data) for s in found]
            return
        for i, flat in enumerate(self.zero.bit16_groups_flat):
            order = self.zero.round_robin_bit16_groups[i]
            if not names[order[0]].startswith(PREFIX):
                continue
            buffer = torch.empty_like(flat)
            for p, at in zip(order, self.zero.round_robin_bit16_offsets[i], strict=True):
                q = mine[names[p].removeprefix(PREFIX)]
                assert q.shape == p.shape, names[p]
                q.data = buffer.narrow(0, at, p.numel()).view(p.shape)
            self.buffers.append((i, buffer))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def refresh(self) -> None:
        for shard, target in self.pairs:
            target.copy_(shard.view("ema").view(target.shape))
        for i, buffer in self.buffers:
            flat = self.zero.single_partition_of_fp32_groups[i]
            ema = self.zero.optimizer.prepare(flat)["ema"]
            gather_partitions(buffer, ema, self.zero.real_dp_process_group[i])
