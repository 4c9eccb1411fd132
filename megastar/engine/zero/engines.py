"""The DeepSpeed engines of a run: the student with its optimizer, and the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megastar.engine.context import Context
from megastar.engine.zero.ema_teacher import ReplicatedTeacher, ShardedTeacher
from megastar.engine.zero.partitions import AdamWEMA, Shard, publish_masters, shards
from megastar.engine.zero.streams import gather_after_updates
from megastar.parallel.plan import split_of


@dataclass
class Engines:
    student: Any  # deepspeed.DeepSpeedEngine around Student
    teacher: ShardedTeacher | ReplicatedTeacher | None
    optimizer: AdamWEMA
    micro_batch: int
    accumulation: int

    def refresh_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.refresh()

    def publish_masters(self) -> None:
        """Copy the fp32 masters and their average to the compute copies of student and teacher on all ranks."""
        publish_masters(self.student)
        self.refresh_teacher()

    def step(self, skip: bool = False) -> bool:
        """DeepSpeed's step, at the end of each micro-batch. False: the gradient was not finite, or ``skip`` was set (on
        all ranks alike), and no weight changed."""
        before = self.student.skipped_steps
        with self.optimizer.skipping(skip):
            self.student.step()
        if self.student.zero_optimization_stage() == 3:
            gather_after_updates(self.student)
        return bool(self.student.skipped_steps == before)

    def set_schedules(self, lr: float, ema_decay: float, muon_lr: float = 0.0) -> None:
        """The values of the step that follows; ``muon_lr`` is the rate of the groups that Muon updates."""
        for group in self.optimizer.param_groups:
            rate = muon_lr if group.get("muon") else lr
            group["lr"], group["ema_decay"] = rate * group.get("lr_scale", 1.0), ema_decay

    def set_step(self, step: int) -> None:
        """Set DeepSpeed's count of steps, on a resume."""
        self.student.global_steps = step

    def updates(self) -> int:
        """Steps that changed the weights, as counted by Adam's bias correction."""
        mine = self.shards()  # empty where there are more ranks than elements
        return int(self.optimizer.prepare(mine[0].flat)["step"].item()) if mine else 0

    def grad_norm(self) -> float:
        """Of the last step, before clipping; infinite if it was skipped."""
        return float(self.student.get_global_grad_norm())

    def shards(self) -> list[Shard]:
        return list(shards(self.student, self.optimizer))


def owned(engines: Engines, ctx: Context) -> list[Shard]:
    """The shards that this rank writes: replicated state is divided among the ranks that hold it."""
    out = []
    replicas = engines.student.zero_optimization_stage() == 0
    for shard in engines.shards():
        if replicas:
            shard = shard.part(ctx.mesh.data_rank, ctx.mesh.data)
        if ctx.tensor > 1 and not split_of(shard.name):
            shard = shard.part(ctx.mesh.tensor_rank, ctx.tensor)
        if shard.start < shard.stop:
            out.append(shard)
    return out


def stored_of(mine: list[Shard]) -> int:
    """Elements that a checkpoint stores of these shards: of the masters, and of each state."""
    return sum((s.stop - s.start) * len(s.kinds) for s in mine)


def full_shapes(engines: Engines, ctx: Context) -> dict[str, list[int]]:
    """Name -> shape of the whole parameter."""
    return whole_shapes(engines.student.module, ctx)


def whole_shapes(module: Any, ctx: Context) -> dict[str, list[int]]:
    """``full_shapes`` of a student's module whose layers are split."""
    out = {}
    for name, p in module.named_parameters():
        shape = list(getattr(p, "ds_shape", p.shape))
        if (split := split_of(name)) and ctx.tensor > 1:
            shape[1 if split.partition == "row" else 0] *= ctx.tensor
        out[name] = shape
    return out
