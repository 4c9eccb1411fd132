"""Detects silent memory corruption: compares, bit for bit, what must be equal on several ranks (docs/faults.md).

Runs just before the optimizer step: that step sends what it changes to all ranks anew, which would hide a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.config.schema import FaultsConfig, TrainConfig
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.engine.fault_tolerance.postmortem import record_lost_rank
from megastar.engine.fault_tolerance.skip_policy import name_ranks
from megastar.engine.rank_sync import gather
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.partitions import is_persistent
from megastar.parallel.plan import split_of
from megastar.parallel.tensor_hash import hash_tensor
from megastar.utils.hostname import host_name


def due(faults: FaultsConfig, train: TrainConfig, step: int, saves: bool = False) -> bool:
    """Whether to compare in the step that follows ``step`` finished ones: every ``checksum_every`` steps, and before each
    save. ``saves``: this step is followed by a save outside of ``save_every``."""
    every = faults.checksum_every
    return bool(every) and (saves or (step + 1) % every == 0 or (step + 1) % train.save_every == 0)


def replicas(engines: Engines, ctx: Context) -> Iterator[tuple[str, str, Tensor]]:
    """(group, name, tensor) of all replicated state; the same list, in the same order, on all ranks.

    "data": over the data ranks, bit for bit. "tensor": over the ranks of a tensor group; see ``compare``.
    """
    stage = engines.student.zero_optimization_stage()
    names = dict(engines.student.module.named_parameters())
    if ctx.mesh.data > 1:
        if stage == 0:
            for shard in engines.shards():
                for kind in shard.kinds:
                    yield "data", f"{shard.name} ({kind})", shard.view(kind)
        else:
            for name, p in names.items():
                if stage < 3 or is_persistent(p):
                    yield "data", name, p
        if stage < 3 and engines.teacher is not None:
            for name, p in engines.teacher.module.named_parameters():
                yield "data", f"teacher's {name}", p
    if ctx.tensor_group is not None:
        mine = {shard.name: shard for shard in engines.shards()}
        for name in names:
            if not split_of(name):  # data ranks hold other parts, or none
                yield "tensor", name, mine[name].view("fp32") if name in mine else torch.empty(0)
        yield "tensor", "the dropout's generator", torch.get_rng_state()
        if ctx.device.type == "cuda":
            yield "tensor", "the GPU's dropout generator", torch.cuda.get_rng_state(ctx.device)


@torch.no_grad()
def compare(run: Path, engines: Engines, ctx: Context, step: int, drift: float) -> None:
    """Raise ``CorruptReplica`` on all ranks when replicas differ, and record the rank at fault in RUN/lost.jsonl.

    Weights that tensor ranks hold whole may drift apart by rounding; a save aligns them. Adam moves a weight by at most the
    learning rate per step: the sum of the rates since the last save is ``drift``. Two ranks that differ by at most twice as
    much have drifted, a larger distance is corruption.
    """
    if ctx.world == 1:
        return
    tensors = list(replicas(engines, ctx))
    count = torch.tensor([step, engines.student.global_steps, engines.student.micro_steps, engines.updates()])
    hashes = torch.stack([hash_tensor(x).to(ctx.device) for *_, x in tensors] + [hash_tensor(count).to(ctx.device)])
    groups = {"data": ctx.data_group, "tensor": ctx.tensor_group, "all": dist.group.WORLD}
    scopes = [scope for scope, *_ in tensors] + ["all"]
    differ = torch.zeros_like(hashes, dtype=torch.bool)
    for scope in dict.fromkeys(scopes):
        mine = torch.tensor([s == scope for s in scopes], device=ctx.device)
        extremes = torch.stack([hashes[mine], ~hashes[mine]])  # ~x reverses the order: one reduction gives both
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=groups[scope])
        differ[mine] = extremes[0] != ~extremes[1]
    anywhere = differ.to(torch.int32)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if not anywhere.any():
        return
    names = [name for _, name, _ in tensors] + ["the step counters"]
    faults = []
    for i in anywhere.nonzero().flatten().tolist():
        value: Any = hashes[i].item()
        if scopes[i] == "tensor" and tensors[i][2].is_floating_point():
            value = _differs_from_first(ctx, tensors[i][2], 2 * drift)
        hosts, values = zip(*gather(ctx, (host_name(), value)), strict=True)
        if found := find_outliers(values, _groups(ctx, scopes[i])):
            faults.append((names[i], *found, list(hosts)))
    if faults:
        raise CorruptReplica(report(run, ctx, step, faults))


def _differs_from_first(ctx: Context, x: Tensor, bound: float) -> bool:
    """Whether any element of ``x`` differs from the first tensor rank's by more than ``bound``."""
    first = x.detach().to(ctx.device, copy=True)
    dist.broadcast(first, src=ctx.mesh.rank - ctx.mesh.tensor_rank, group=ctx.tensor_group)
    return not bool(((x.detach().to(ctx.device) - first).abs() <= bound).all())  # True for NaN too


def _groups(ctx: Context, scope: str) -> list[list[int]]:
    """The groups of ranks whose values must be equal."""
    if scope == "all":
        return [list(range(ctx.world))]
    if scope == "tensor":
        return [list(range(first, first + ctx.tensor)) for first in range(0, ctx.world, ctx.tensor)]
    return [list(range(first, ctx.world, ctx.tensor)) for first in range(ctx.tensor)]


def find_outliers(values: Sequence[Any], groups: list[list[int]]) -> tuple[list[int], bool] | None:
    """The ranks whose value differs from their group's majority, and True; all ranks of the group, and False, where no
    value has a majority. None where nothing differs. ``values``: one per rank."""
    odd: list[int] = []
    certain = True
    for ranks in groups:
        value, times = Counter(values[r] for r in ranks).most_common(1)[0]
        if times == len(ranks):
            continue
        majority = 2 * times > len(ranks)
        certain = certain and majority
        odd += [r for r in ranks if values[r] != value] if majority else ranks
    return (odd, certain) if odd else None


def report(run: Path, ctx: Context, step: int, faults: list[tuple[str, list[int], bool, list[str]]]) -> str:
    """The error message; where majorities agree on the ranks at fault, rank 0 records them for the batch script."""
    name, ranks, certain, hosts = faults[0]
    certain = certain and all(f[2] for f in faults)
    if ctx.main and certain:
        for rank in ranks:
            record_lost_rank(run, rank, hosts[rank], "corrupt")
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    where = name_ranks({"rank": r, "host": hosts[r]} for r in ranks)
    if certain:
        what = f"on {where} alone: the memory there is faulty, exclude the host"
    else:
        what = f"between {where}, and no majority shows which is wrong: test these hosts with megastar doctor"
    return f"step {step}: {name}{more} must be equal on all replicas, and differs {what}; the last checkpoint is older"
