"""Run from test_leaving.py: pairs of ranks that leave with 85 right after a collective; prints every status."""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist

from megastar.utils.process_exit import run_and_leave
from tests.dist.workers.watchdog_worker import store_at

PAIRS = 30
held = []  # the tensor outlives the collective, as a gradient does


def leave_after_a_collective(rank: int, listening: socket.socket) -> int:
    dist.init_process_group("gloo", store=store_at(listening, rank), rank=rank, world_size=2)
    sys.setswitchinterval(100)  # who waits for Python's lock gets it when it is given up, no sooner
    held.append(torch.ones(1))
    dist.all_reduce(held[0])
    raise SystemExit(85)


def main() -> None:
    statuses = []
    for _ in range(PAIRS):
        pids = []
        with socket.create_server(("127.0.0.1", 0)) as listening:
            for rank in range(2):
                pids.append(os.fork())
                if not pids[-1]:
                    run_and_leave(lambda rank=rank, s=listening: leave_after_a_collective(rank, s))
        statuses += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(*statuses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
