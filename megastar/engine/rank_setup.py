"""This process as a rank: its place, device and threads, and the process group, without DeepSpeed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megastar.config.sections.rank_faults import RankFaultsConfig
from megastar.errors import UserError
from megastar.parallel.rendezvous import join, on_one_node
from megastar.utils.device import keep_freed_memory
from megastar.utils.interfaces import loopback_environment
from megastar.utils.launcher import cores_of_rank, place_of


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


def set_device(local: int, threads: int, faults: RankFaultsConfig, *, deterministic: bool = False) -> torch.device:
    """This rank's device, with its number of ``threads`` (0: its share of the cores). Raises ``UserError`` for a local
    rank without a GPU."""
    # A stop signal to the process group would end inductor's worker processes, and a rank that compiles would wait for them.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if deterministic:
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
        set_nccl_timeouts(faults)
        if threads:
            torch.set_num_threads(threads)
        return device
    torch.set_num_threads(threads or cores_of_rank(os.environ))
    keep_freed_memory()
    return torch.device("cpu")


def set_nccl_timeouts(faults: RankFaultsConfig) -> None:
    """NCCL's own watchdog thread ends the process some time after an error or a hang: let megastar's watchdogs, which name
    the rank, act first (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp waits four times the first of these values)."""
    if faults.lost_timeout:
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(int(250 * (faults.lost_timeout + 60))))
    if faults.hang_timeout:
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(faults.hang_timeout + 120)))


def init_group(
    rank: int,
    world: int,
    device: torch.device,
    timeout: timedelta,
    join_timeout: float,
    stopped: Callable[[], int] = lambda: 0,
) -> str:
    """Wait for the other ranks and create the process group, unless this process has one; returns its backend.

    ``timeout``: of a collective. ``stopped``: the number of a stop signal, or 0. Raises as ``parallel.rendezvous.join``.
    """
    cuda = device.type == "cuda"
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        store = join(join_timeout, stopped) if world > 1 else dist.HashStore()  # which needs no port
        store.set_timeout(timeout)
        # DeepSpeed gives no device_id, without which torch warns at a barrier.
        own = device if cuda else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=own)
    return backend
