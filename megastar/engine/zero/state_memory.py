"""Measured bytes of state in this process, by cause, for comparison with the estimate of parallel/budget.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megastar.checkpoint.shard_format import MUON_KINDS, STATES
from megastar.engine.zero.engines import Engines


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def state_bytes(engines: Engines) -> dict[str, int]:
    """Between steps: ``weights`` (compute copy), ``optimizer`` (masters, moments, average) and ``teacher``."""
    stage, zero = engines.student.zero_optimization_stage(), engines.student.optimizer
    flats = []
    if stage:
        flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    weights = _copies(engines.student.module)
    held = {w.untyped_storage().data_ptr() for w in weights}  # the weights may be their own masters
    flats = [f for f in flats if f.untyped_storage().data_ptr() not in held]
    states = [s[k] for s in engines.optimizer.state.values() for k in {*STATES, *MUON_KINDS} if k in s]
    return {
        "weights": storage_bytes(weights),
        "optimizer": storage_bytes([*flats, *states]),
        "teacher": storage_bytes(_copies(engines.teacher.module)) if engines.teacher else 0,
    }


def _copies(module: torch.nn.Module) -> list[Tensor]:
    """Shards, and parameters that stay gathered."""
    parameters = list(module.parameters())
    return [p.data for p in parameters] + [p.ds_tensor.data for p in parameters if hasattr(p, "ds_tensor")]
