"""The process group of a run: this rank's device, the ranks' store, groups and timeouts."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import groups

from megastar.config.load import resolve_batch
from megastar.config.schema import DataConfig, FaultsConfig, RunConfig
from megastar.data.storage.store import is_remote
from megastar.engine.context import Context
from megastar.engine.phase import DATA_EXTRA
from megastar.engine.rank_sync import from_main
from megastar.errors import UserError
from megastar.parallel.rendezvous import join, on_one_node
from megastar.utils.device import keep_freed_memory, pick_dtype
from megastar.utils.interfaces import loopback_environment
from megastar.utils.launcher import local_world, place_of


def start(cfg: RunConfig, stopped: Callable[[], int] = lambda: 0) -> Context:
    """Join the process group described by torchrun, deepspeed or srun; a group of one process without a launcher.

    ``stopped``: the number of a stop signal, or 0; it ends the wait for other ranks. Raises as ``parallel.rendezvous.join``.
    """
    rank, world, local = read_place()
    device = set_device(cfg, local)
    cuda = device.type == "cuda"
    backend = "nccl" if cuda else "gloo"
    timeout = collective_timeout(cfg.faults, cfg.data)
    if not dist.is_initialized():
        store = join(cfg.faults.join_timeout, stopped) if world > 1 else dist.HashStore()  # which needs no port
        store.set_timeout(timeout)
        # DeepSpeed gives no device_id, without which torch warns at a barrier.
        own = device if cuda else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=own)
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


def read_place() -> tuple[int, int, int]:
    """(rank, world size, local rank), which DeepSpeed reads from the environment. Ranks on one node use its loopback."""
    rank, world, local = place_of(os.environ)
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1:
        local = 0  # --gpus-per-task=1: each task sees only its own GPU, as number 0
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local))
    if world == 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    elif on_one_node():
        os.environ |= loopback_environment() | os.environ
    return rank, world, local


def set_device(cfg: RunConfig, local: int) -> torch.device:
    """This rank's device, with its number of threads. Raises ``UserError`` for a local rank without a GPU."""
    # A stop signal to the process group would end inductor's worker processes, and a rank that compiles would wait for them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        importlib.import_module("torch.utils.deterministic").fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU, this process sees {torch.cuda.device_count()}: start at most one process per GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        set_nccl_timeouts(cfg.faults)
        if cfg.train.threads:
            torch.set_num_threads(cfg.train.threads)
        return device
    cores = len(os.sched_getaffinity(0))
    ranks = local_world(os.environ) or place_of(os.environ).world
    torch.set_num_threads(cfg.train.threads or max(1, cores // ranks))
    keep_freed_memory()
    # Compiling DeepSpeed's shared-memory collective takes minutes, and gloo does not need it.
    # (import_module, because the attribute deepspeed.comm.torch is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return torch.device("cpu")


def set_nccl_timeouts(faults: FaultsConfig) -> None:
    """NCCL's own watchdog thread ends the process some time after an error or a hang: let megastar's watchdogs, which name
    the rank, act first (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp waits four times the first of these values)."""
    if faults.lost_timeout:
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(int(250 * (faults.lost_timeout + 60))))
    if faults.hang_timeout:
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(faults.hang_timeout + 120)))


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
