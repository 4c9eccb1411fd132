"""Run from test_watchdog.py: rank RANK of a loop of small collectives under a watchdog, and what happens to one rank.

    python watchdog_worker.py FOLDER SCENARIO...     all scenarios at once, each with its own ranks and store

The ranks are forked from one process, which has imported torch for all of them.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megastar.config.schema import RunConfig
from megastar.engine.fault_tolerance.watchdog import watch
from megastar.engine.phase import DATA, PHASE
from megastar.errors import UserError
from megastar.parallel.rendezvous import host_store, open_client
from megastar.utils.hostname import shorten_dns_timeout
from megastar.utils.launcher import LISTEN_FD

WORLD, AT = 3, 20
STEP_S = 0.1  # all scenarios share the cores: ranks that never sleep would seem silent


def config(folder: Path, hang: float, lost: float) -> RunConfig:
    cfg = RunConfig(run=str(folder))
    cfg.faults.hang_timeout, cfg.faults.lost_timeout = hang, lost
    return cfg


def stuck_in_the_disk() -> None:
    time.sleep(1000)


def loop(cfg: RunConfig, rank: int, scenario: Scenario, listening: socket.socket) -> None:
    store = store_at(listening, rank)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    with watch(cfg, rank, WORLD):
        x = torch.ones(8)
        for step in range(scenario.steps):
            PHASE.begin(step + 1)
            PHASE.at(DATA)
            time.sleep(STEP_S)
            if rank == scenario.victim and step == AT and scenario.happens:
                scenario.happens()
            PHASE.at("forward")
            PHASE.at("asking all ranks")
            dist.all_reduce(x)
            Path(cfg.run, f"at-{rank}").write_text(str(step + 1))
        PHASE.at("ending")


def fail() -> None:
    raise UserError("the shard is unreadable: fix it")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass
class Scenario:
    """``happens`` to rank ``victim`` at step AT; time-outs in seconds."""

    victim: int
    happens: Callable[[], None] | None
    hang: float = 60
    lost: float = 3
    steps: int = 10_000


SCENARIOS = {
    "stopped": Scenario(1, stop),
    "stopped-0": Scenario(0, stop),
    "killed": Scenario(1, kill),
    "killed-0": Scenario(0, kill),
    "hung": Scenario(1, stuck_in_the_disk, hang=3, lost=30),
    "failed": Scenario(1, fail),
    "failed-0": Scenario(0, fail),
    "paused": Scenario(-1, None, hang=3, steps=40),
}


def store_at(listening: socket.socket, rank: int) -> dist.TCPStore:
    """The store of a group of forked ranks. ``listening``: rank 0's socket, opened before the forks, so that no other
    process can take its port; nothing on the other ranks keeps it open."""
    host, port = listening.getsockname()
    fd = listening.detach()
    if rank == 0:
        return host_store(host, port, {LISTEN_FD: str(fd)})
    os.close(fd)
    return open_client(host, port, 300)


def fork(folder: Path, name: str) -> dict[int, int]:
    """Rank -> pid. Each rank's output goes to FOLDER/NAME/rank-N.txt."""
    scenario = SCENARIOS[name]
    run = folder / name
    run.mkdir()
    listening = socket.create_server(("127.0.0.1", 0))
    pids = {}
    for rank in range(WORLD):
        if pid := os.fork():
            pids[rank] = pid
            continue
        out = os.open(run / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = 0
        try:
            loop(config(run, scenario.hang, scenario.lost), rank, scenario, listening)
        except UserError as error:
            os.write(2, f"error: {error}\n".encode())
            status = 2
        except BaseException as error:
            os.write(2, f"raised: {error!r}\n".encode())
            status = 1
        os._exit(status)
    listening.close()
    return pids


def pause(run: Path, pids: dict[int, int]) -> None:
    """All ranks stand still for longer than any time-out, in the middle."""
    while not all((run / f"at-{r}").is_file() for r in pids):
        time.sleep(0.05)
    for number, seconds in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 0.0)):
        for pid in pids.values():
            os.kill(pid, number)
        time.sleep(seconds)


def main(folder: Path, names: list[str]) -> None:
    ranks = {name: fork(folder, name) for name in names}
    if "paused" in ranks:
        threading.Thread(target=pause, args=(folder / "paused", ranks["paused"]), daemon=True).start()
    left = {pid: (name, rank) for name, pids in ranks.items() for rank, pid in pids.items()}
    deadline, began = time.monotonic() + 150, time.monotonic()
    while left and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            name, rank = left.pop(pid)
            (folder / name / f"status-{rank}").write_text(str(os.waitstatus_to_exitcode(status)))
            (folder / name / f"time-{rank}").write_text(f"{time.monotonic() - began:.1f}")
            others = [p for p, (other, _) in left.items() if other == name]
            if len(others) == 1 and left[others[0]][1] == SCENARIOS[name].victim:
                os.kill(others[0], signal.SIGKILL)  # the stopped one: the rest have ended
        time.sleep(0.02)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shorten_dns_timeout()
    main(Path(sys.argv[1]), sys.argv[2:])
