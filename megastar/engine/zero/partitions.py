"""The EMA optimizer, and the location of each rank's fp32 masters in ZeRO's partitions.

The EMA of the fp32 masters is one more state of the optimizer: it is sharded, saved and offloaded as Adam's moments are, at
every stage, and its update never communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megastar.checkpoint.shard_format import kinds_of
from megastar.config.sections.optim import MuonConfig
from megastar.engine.zero.streams import gather_after_updates
from megastar.parallel.alignment import PROJECTORS
from megastar.parallel.plan import block_matrix
from megastar.teacher.ema import lerp_


class AdamWEMA(torch.optim.AdamW):
    """AdamW with one more state, ``ema``: the moving average of the parameters, which are this rank's fp32 master shards.

    ``ema_decay`` is set in each group before a step; 0 makes the average equal to the weights.
    """

    name = "adamw"  # optim.name

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, fused=True, **defaults)  # one pass over memory, on a CPU too
        # Gradients of parts of a flat tensor, (offset, flat gradient) each, instead of its ``grad`` (one_data_rank.py).
        self.pieces: dict[Tensor, list[tuple[int, Tensor]]] = {}
        self.skip_next = False  # by ``skipping``; read by step_skip.py
        self.overflow = False  # at ZeRO stage 0, where DeepSpeed asks this optimizer, whether this step is dropped
        for group in self.param_groups:
            group["ema_decay"] = 0.0

    @contextmanager
    def skipping(self, skip: bool) -> Iterator[None]:
        """DeepSpeed's step within drops the gradients and changes no weight if ``skip``, on all ranks alike."""
        self.skip_next = skip
        try:
            yield
        finally:
            self.skip_next = False

    @torch.no_grad()
    def prepare(self, p: Tensor) -> dict[str, Tensor]:
        """The state of ``p``, created if there is none: zero moments, the average equal to the weights."""
        state: dict[str, Tensor] = self.state[p]
        if "ema" not in state:  # AdamW creates its own states only when it finds none
            state["step"] = torch.zeros((), device=p.device)  # where the fused step expects it
            for name in self.moments(p):
                state[name] = torch.zeros_like(p)
            state["ema"] = p.detach().clone()
        return state

    def moments(self, p: Tensor) -> tuple[str, ...]:
        """The names of the states of ``p`` besides its step and average."""
        return ("exp_avg", "exp_avg_sq")

    def steps_on_pieces(self, p: Tensor) -> bool:
        """Whether ``pieces`` can take the place of the gradient of ``p``."""
        return True

    def _step_pieces(self, group: dict[str, Any], p: Tensor, pieces: list[tuple[int, Tensor]]) -> None:
        state = self.state[p]

        def parts(whole: Tensor) -> list[Tensor]:
            return [whole.detach().narrow(0, at, len(g)) for at, g in pieces]

        adamw(
            parts(p), [g for _, g in pieces], parts(state["exp_avg"]), parts(state["exp_avg_sq"]), [],
            [state["step"].clone() for _ in pieces], fused=True, amsgrad=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        state["step"] += 1

    def update(self, closure: Callable[[], float] | None = None) -> float | None:
        """The optimizer's step without the average's."""
        for group in self.param_groups if self.pieces else ():
            for p in group["params"]:
                if p in self.pieces:
                    self._step_pieces(group, p, self.pieces.pop(p))
                    p.grad = None
        result: float | None = super().step(closure)
        return result

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.overflow:
            return None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.prepare(p)  # before the first update
        result = self.update(closure)
        for group in self.param_groups:
            moved = [p for p in group["params"] if "ema" in self.state.get(p, {})]
            lerp_([self.state[p]["ema"] for p in moved], moved, group["ema_decay"])
        return result


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    muon: MuonConfig | None = None,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Weight decay on tensors of two or more dimensions only (st-ar.md, training set-up).

    The projectors have separate groups: the teacher has none, so a replicated teacher gathers whole groups. So do, with
    ``muon``, the weights that Muon updates; their groups have ``muon`` set. ``scale``: name -> factor of the learning rate,
    a group's ``lr_scale``; weights with the factor 0 have no decay.
    """
    groups: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            decays = len(getattr(p, "ds_shape", p.shape)) >= 2  # under zero.Init p itself is empty
            matrix = muon is not None and block_matrix(name) is not None
            groups.setdefault((name.startswith(PROJECTORS), not decays, matrix, scale(name)), []).append(p)
    out: list[dict[str, Any]] = []
    for key in sorted(groups):
        out.append({"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay})
        if muon is not None and key[2]:
            out[-1] |= {"lr": muon.lr, "weight_decay": muon.weight_decay, "muon": True}
        if key[3] != 1:
            out[-1] |= {"lr_scale": key[3]} | ({} if key[3] else {"weight_decay": 0.0})
    return out


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: elements start..stop of its flattened tensor-parallel weight.

    ``flat`` is the tensor that the optimizer updates; the elements begin at ``offset`` in it.
    """

    name: str
    shape: tuple[int, ...]  # of the tensor-parallel weight
    start: int
    stop: int
    flat: Tensor
    offset: int
    optimizer: AdamWEMA

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a checkpoint stores of it."""
        return kinds_of(self.name, self.optimizer.name)

    def view(self, kind: str) -> Tensor:
        """The elements, (stop - start,); ``kind`` is one of ``kinds``. A missing state is created."""
        whole = self.flat.detach() if kind == "fp32" else self.optimizer.prepare(self.flat)[kind]
        return whole.view(-1).narrow(0, self.offset, self.stop - self.start)

    def part(self, piece: int, pieces: int) -> Shard:
        """One of ``pieces`` nearly equal parts: of replicated state each replica writes one."""
        length = self.stop - self.start
        first, last = length * piece // pieces, length * (piece + 1) // pieces
        return replace(self, start=self.start + first, stop=self.start + last, offset=self.offset + first)


def shards(engine: Any, optimizer: AdamWEMA) -> Iterator[Shard]:
    """Each parameter's shard on this rank without empty ones; ``engine`` is the student's, at any ZeRO stage."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    names = {p: n for n, p in engine.module.named_parameters()}
    if stage == 0:
        for p, name in names.items():
            yield Shard(name, tuple(p.shape), 0, p.numel(), p, 0, optimizer)
    elif stage < 3:  # flat groups are cut into equal partitions regardless of parameter boundaries
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            size = flat.numel()
            first = dist.get_rank(zero.real_dp_process_group[i]) * size
            order, offsets = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
            for p, at in zip(order, offsets, strict=True):
                low, high = max(at, first), min(at + p.numel(), first + size)
                if low < high:
                    yield Shard(names[p], tuple(p.shape), low - at, high - at, flat, low - first, optimizer)
    else:  # each parameter is cut into equal partitions, the last one padded
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset = 0
            for p in group:
                size = p.partition_numel()
                low, high = rank * size, min((rank + 1) * size, p.ds_numel)
                if low < high:
                    yield Shard(names[p], tuple(p.ds_shape), low, high, flat, offset, optimizer)
                offset += size


def flats_of(engine: Any, optimizer: AdamWEMA) -> Iterator[list[tuple[Tensor, list[str]]]]:
    """The tensors that one call of the optimizer's step updates, each with the names of the weights of which it is a part;
    in the same order on all ranks."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        yield [(shard.flat, [shard.name]) for shard in shards(engine, optimizer)]
        return
    names = {p: n for n, p in engine.module.named_parameters()}
    if stage < 3:
        flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
    else:  # a group may be several sub-groups
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
    for flat, group in zip(flats, groups, strict=True):
        yield [(flat, [names[p] for p in group])]


def is_persistent(p: Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter whole on every data rank (stage3_param_persistence_threshold)."""
    return bool(getattr(p, "ds_persist", False))


def publish_masters(engine: Any) -> None:
    """Copy the fp32 masters, rounded, to the compute copies of all ranks, after a checkpoint was read into the masters."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            gather_partitions(zero.bit16_groups_flat[i], flat, zero.real_dp_process_group[i])
    elif stage == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset = 0
            for p in group:
                size = p.partition_numel()
                p.ds_tensor.data.view(-1)[:size].copy_(flat.detach().narrow(0, offset, size))
                offset += size
        if zero.persistent_parameters:  # small parameters that stay gathered
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        gather_after_updates(engine)


@torch.no_grad()
def gather_partitions(whole: Tensor, mine: Tensor, group: dist.ProcessGroup) -> None:
    """Fill the flat ``whole`` (ranks x size) with each rank's ``mine`` (size), rounded to its type, in rank order."""
    size = mine.numel()
    part = whole.narrow(0, dist.get_rank(group) * size, size)
    part.copy_(mine.detach())
    if dist.get_world_size(group) > 1:
        dist.all_gather_into_tensor(whole, part.clone(), group=group)
