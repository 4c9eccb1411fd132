import os

import pytest

from megastar.errors import UserError
from megastar.utils.launcher import LAUNCHED_BY_US, cores_of_rank, is_launched, local_world, place_of

SALLOC = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
STEP = SALLOC | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x2),1"}


@pytest.mark.parametrize(
    ("environ", "place", "local"),
    [
        ({}, (0, 1, 0), 1),
        ({"WORLD_SIZE": "2"}, (0, 1, 0), 1),  # left in the shell
        ({"RANK": "3"}, (0, 1, 0), 1),
        ({"LOCAL_RANK": "3"}, (0, 1, 0), 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1), 2),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}, (3, 8, 3), 4),  # deepspeed
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0), 0),
        (SALLOC, (0, 1, 0), 1),
        (STEP | {"SLURM_PROCID": "2"}, (2, 3, 0), 1),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0), 1),  # the interactive step of salloc
        (STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1), 0),  # --nproc in a step
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3"}, (0, 3, 0), 3),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, (0, 4, 0), 1),
    ],
)
def test_the_place_of_a_rank(environ, place, local):
    assert place_of(environ) == place
    assert local_world(environ) == local
    assert is_launched(environ) is (place[1] > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK='x' is not a count"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is not a count"),
        ({"RANK": "2"}, "RANK=2 is not below the number of ranks, 2"),
    ],
)
def test_a_wrong_place_is_named(change, message):
    with pytest.raises(UserError, match=message):
        place_of({"RANK": "0", "WORLD_SIZE": "2"} | change)


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, 24),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_CPUS_PER_TASK": "12"}, 12),  # bound to 24 of the node's cores
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_CPUS_PER_TASK": "48"}, 24),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3"}, 8),
        (
            STEP | {"SLURM_CPUS_PER_TASK": "12", "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"},
            12,
        ),  # set from srun's
        (STEP | {"SLURM_CPUS_PER_TASK": "12", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 12),  # torchrun
        (STEP | {"SLURM_CPUS_PER_TASK": "1", "RANK": "1", "WORLD_SIZE": "4", LAUNCHED_BY_US: "7"}, 6),  # --nproc
        (SALLOC | {"SLURM_CPUS_PER_TASK": "4"}, 24),
    ],
)
def test_the_cores_of_a_rank(environ, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    assert cores_of_rank(environ) == cores
