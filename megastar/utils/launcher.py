"""The place of this process among the ranks of a launch, as torchrun, deepspeed, srun or ``--nproc`` describe it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from megastar.errors import UserError

LAUNCHED_BY_US = "MEGASTAR_LAUNCHER"  # process id of commands/_shared/launch.py, for the ranks that it starts
LOCAL_WORLDS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # ranks of a node, by torchrun and deepspeed
LISTEN_FD = "MEGASTAR_LISTEN_FD"  # on rank 0 of such a launch: its listening socket


class RankPlace(NamedTuple):
    rank: int
    world: int
    local: int  # rank on this node


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as a rank. A single RANK or WORLD_SIZE is a leftover in the shell."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    # A batch script or an salloc shell has SLURM_PROCID too; only an srun step has SLURM_STEP_ID.
    return "SLURM_STEP_ID" in environ and slurm_tasks(environ) > 1


def place_of(environ: Mapping[str, str]) -> RankPlace:
    """The only reader of rank and world size; (0, 1, 0) without a launcher. Raises ``UserError``."""
    if not is_launched(environ):
        return RankPlace(0, 1, 0)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = "RANK", "LOCAL_RANK"
        world = _integer(environ, "WORLD_SIZE")
    else:
        names = "SLURM_PROCID", "SLURM_LOCALID"
        world = slurm_tasks(environ)
    rank, local = _integer(environ, names[0]), _integer(environ, names[1], "0")
    if rank >= world:
        raise UserError(f"{names[0]}={rank} is not below the number of ranks, {world}: check the launcher's variables")
    return RankPlace(rank, world, local)


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of this job step. Inside salloc, SLURM_NTASKS is the number of the allocation, not of the step."""
    return _integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", "1")


def local_world(environ: Mapping[str, str]) -> int:
    """The number of ranks on this node, 0 if the launcher does not provide it."""
    world = place_of(environ).world
    for name in LOCAL_WORLDS:
        if name in environ and world > 1 and "RANK" in environ:
            return _integer(environ, name)
    if world == 1:
        return 1
    if "RANK" in environ or "SLURM_STEP_ID" not in environ:
        return 0
    counts: list[int] = []  # SLURM_STEP_TASKS_PER_NODE: "4(x2),3"
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 0


def cores_of_rank(environ: Mapping[str, str]) -> int:
    """The CPU cores for this rank: those that SLURM gave to its task, or its share of the cores of the process."""
    own, by_srun = len(os.sched_getaffinity(0)), "SLURM_STEP_ID" in environ and slurm_tasks(environ) > 1
    others = (*LOCAL_WORLDS, LAUNCHED_BY_US)  # of launchers inside the step
    if by_srun and environ.get("SLURM_CPUS_PER_TASK") and not any(name in environ for name in others):
        # The task may be bound to its own cores, or not: then it sees those of all tasks of the node.
        return max(1, min(own, _integer(environ, "SLURM_CPUS_PER_TASK")))
    return max(1, own // (local_world(environ) or place_of(environ).world))


def _integer(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text!r} is not a count: unset it, or let the launcher set it")
    return int(text)
