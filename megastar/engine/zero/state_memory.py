"""Measured bytes of state in this process, by cause, for comparison with the estimate of parallel/budget.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megastar.checkpoint.shard_format import STATES
from megastar.engine.zero.ema_teacher import ReplicatedTeacher, ShardedTeacher
from megastar.engine.zero.engines import Engines


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def state_bytes(engines: Engines) -> dict[str, int]:
    """Between steps: ``weights`` (compute copy), ``optimizer`` (masters, moments, average) and ``teacher``."""
    stage, zero = engines.student.zero_optimization_stage(), engines.student.optimizer
    if stage == 3:
        flats = list(zero.fp32_partitioned_groups_flat)
    elif stage:
        flats = list(zero.single_partition_of_fp32_groups)
    else:
        flats = []  # the weights are their own masters
    states = [s[k] for s in engines.optimizer.state.values() for k in STATES if k in s]
    return {
        "weights": storage_bytes(_copies(engines.student.module)),
        "optimizer": storage_bytes([*flats, *states]),
        "teacher": storage_bytes(_teacher(engines.teacher)),
    }


def _copies(module: torch.nn.Module) -> list[Tensor]:
    """Shards, and parameters that stay gathered."""
    out: list[Tensor] = []
    for p in module.parameters():
        out.append(p.data)
        if hasattr(p, "ds_tensor"):
            out.append(p.ds_tensor.data)
    return out


def _teacher(teacher: ShardedTeacher | ReplicatedTeacher | None) -> list[Tensor]:
    if teacher is None:
        return []
    return _copies(teacher.engine.module if isinstance(teacher, ShardedTeacher) else teacher.module)
