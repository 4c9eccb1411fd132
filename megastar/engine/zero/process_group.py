"""The process group of a run: this rank's device, the ranks' store, groups and timeouts."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import groups

from megastar.config.load import resolve_batch
from megastar.config.schema import DataConfig, FaultsConfig, RunConfig
from megastar.data.storage.store import is_remote
from megastar.engine.context import Context
from megastar.engine.phase import DATA_EXTRA
from megastar.engine.rank_setup import init_group, read_place, set_device
from megastar.engine.rank_sync import from_main
from megastar.utils.device import pick_dtype


def start(cfg: RunConfig, stopped: Callable[[], int] = lambda: 0) -> Context:
    """Join the process group described by torchrun, deepspeed or srun; a group of one process without a launcher.

    ``stopped``: the number of a stop signal, or 0; it ends the wait for other ranks. Raises as ``parallel.rendezvous.join``.
    """
    rank, world, local = read_place()
    device = set_device(local, cfg.train.threads, cfg.faults, deterministic=cfg.train.deterministic)
    if device.type == "cpu":
        # Compiling DeepSpeed's shared-memory collective takes minutes, and gloo does not need it.
        # (import_module, because the attribute deepspeed.comm.torch is torch itself.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    timeout = collective_timeout(cfg.faults, cfg.data)
    backend = init_group(rank, world, device, timeout, cfg.faults.join_timeout, stopped)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    context = Context(rank, world, device, pick_dtype(cfg.train.dtype, device), cfg.parallel.tensor_parallel)
    resolve_batch(cfg.train, cfg.parallel.tensor_parallel, world)  # validates the world size before groups are created
    context.data_group = dist.group.WORLD if world > 1 else None
    if context.tensor > 1:
        groups._init_tp_mesh_device(tensor_model_parallel_size=context.tensor)
        context.tensor_group = groups.get_tensor_model_parallel_group()
        context.data_group = groups.get_data_parallel_group()
        assert dist.get_rank(context.tensor_group) == context.mesh.tensor_rank
        assert dist.get_rank(context.data_group) == context.mesh.data_rank
    # Through the group's own connections: clients of the store do not see it.
    context.secret = bytes.fromhex(from_main(context, secrets.token_hex(32)))
    return context


def collective_timeout(faults: FaultsConfig, data: DataConfig) -> timedelta:
    """Timeout of a collective, longer than that of the watchdogs, which report more.

    After it NCCL's own watchdog ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3, torch's default), and gloo raises. A
    rank may wait for S3 while the others wait for it in a collective.
    """
    seconds = faults.hang_timeout + 60 if faults.hang_timeout else default_pg_timeout.total_seconds()
    if is_remote(data.shards) or is_remote(data.val_shards):
        seconds = max(seconds, faults.hang_timeout + data.patience + DATA_EXTRA + 60)
    return timedelta(seconds=seconds)


def set_timeouts(timeout: timedelta) -> None:
    """Set the timeout of all groups: those created by DeepSpeed and the tensor mesh have NCCL's default of 10 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
