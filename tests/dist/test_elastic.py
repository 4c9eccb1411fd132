"""Agents of several nodes on loopback: who is used, who restarts, who is left, when one is lost, joins or ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megastar.run_dir.events import read_events
from tests.dist.workers import elastic_worker
from tests.integration.conftest import ROOT, environment
from tests.slurm.cluster import free_ports

pytestmark = [pytest.mark.dist, pytest.mark.long]
PATIENCE = 120


class Nodes:
    """The nodes of one job, by their index among the hosts."""

    def __init__(self, server: subprocess.Popen, folder: Path, nodes: str, hosts: int, batch: int = 12, join: int = 60):
        self.server, self.folder = server, folder
        (folder / "ranks").mkdir(exist_ok=True)
        self.words = f"{nodes} {hosts} {free_ports(hosts)} 1 {batch} {join}"
        self.pids: dict[int, int] = {}

    def start(self, *indices: int) -> None:
        for k in indices:
            self.server.stdin.write(f"{self.folder} {k} {self.words}\n")
            self.server.stdin.flush()
            self.pids[k] = int(self.server.stdout.readline())

    def ranks(self) -> list[dict]:
        found = [json.loads(path.read_text()) for path in (self.folder / "ranks").glob("*.json")]
        return sorted((r for r in found if is_alive(r["pid"])), key=lambda r: int(r["RANK"]))

    def wait_for_ranks(self, count: int, former: list[dict] | None = None, stopped: int = 0) -> list[dict]:
        """``count`` ranks that know of each other, all newer than the ``former``; not the process ``stopped``."""
        old, deadline = {r["pid"] for r in former or ()}, time.monotonic() + PATIENCE
        while True:
            now = [r for r in self.ranks() if r["pid"] != stopped]
            if (
                len(now) == count
                and not old & {r["pid"] for r in now}
                and {r["WORLD_SIZE"] for r in now} == {str(count)}
                and [r["RANK"] for r in now] == [str(n) for n in range(count)]
            ):
                return now
            assert time.monotonic() < deadline, f"{now}\n{self.log()}"
            time.sleep(0.05)

    def detected(self, fault: str, began: float, what: Callable[[], object], most: float) -> None:
        """``what`` shows that the agents have detected ``fault``, which happened at ``began``; prints the seconds."""
        while not what():
            assert time.monotonic() - began < PATIENCE, self.log()
            time.sleep(0.02)
        seconds = time.monotonic() - began
        print(f"{fault}: detected in {seconds:.1f} s", flush=True)
        assert seconds < most, self.log()

    def node_of(self, rank: dict) -> int:
        return next(k for k, pid in self.pids.items() if pid == int(rank["MEGASTAR_AGENT"]))

    def lose(self, k: int) -> None:
        os.kill(self.pids.pop(k), signal.SIGKILL)

    def ends(self) -> dict[int, list]:
        """Status and message of every node that was started and not lost."""
        deadline = time.monotonic() + PATIENCE
        while not all((self.folder / f"node-{k}").is_file() for k in self.pids):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return {k: json.loads((self.folder / f"node-{k}").read_text()) for k in sorted(self.pids)}

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", elastic_worker.__name__]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def nodes(server, tmp_path):
    made: list[Nodes] = []
    yield lambda *words, **more: made.append(Nodes(server, tmp_path, *words, **more)) or made[-1]
    for job in made:
        job.close()


def test_nodes_are_lost_join_and_end_together(nodes, tmp_path):
    job = nodes("2:3", hosts=4)
    job.start(0, 1, 2)
    three = job.wait_for_ranks(3)
    assert {r["words"][-1] for r in three} == {"train.micro_batch=2"}
    memories = {r["MEGASTAR_MEMORY"] for r in three}
    assert len(memories) == 3 and all(Path(m).stat().st_mode & 0o777 == 0o700 for m in memories)

    began = time.monotonic()
    job.lose(0)  # it kept the nodes' store
    job.detected("the store's node is lost, its connections close", began, lambda: "is lost" in job.log(), 30)
    two = job.wait_for_ranks(2, three)
    assert {r["words"][-1] for r in two} == {"train.micro_batch=2"} and {r["TORCHELASTIC_RUN_ID"] for r in two} == {
        "job"
    }
    job.start(3)  # it finds the store where it is now; the ranks end by SIGUSR2, and this is no failure
    three = job.wait_for_ranks(3, two)

    began = time.monotonic()
    os.kill(three[1]["pid"], signal.SIGKILL)
    job.detected("SIGKILL of one of 3 ranks", began, lambda: not any(is_alive(r["pid"]) for r in three), 30)
    again = job.wait_for_ranks(3, three)
    assert {r["MEGASTAR_MEMORY"] for r in again} == {r["MEGASTAR_MEMORY"] for r in three}  # it outlives the ranks

    stopped, silent = again[2]["pid"], job.node_of(again[2])  # a machine that loses its network closes no connection
    began = time.monotonic()
    for pid in (job.pids[silent], stopped):
        os.kill(pid, signal.SIGSTOP)
    job.detected("a node is silent", began, lambda: read_events(tmp_path), 60)
    job.wait_for_ranks(2, again, stopped)
    assert [e["event"] for e in read_events(tmp_path)] == ["lost"]
    job.lose(silent)
    (tmp_path / "exit").write_text("85")  # a final status: no agent restarts
    assert {tuple(end) for end in job.ends().values()} == {(85, "")}
    assert [Path(r["MEGASTAR_MEMORY"]).exists() for r in again] == [False, False, True]


def test_a_store_that_does_not_answer_for_a_while_does_not_split_the_nodes(nodes):
    job = nodes("1:2", hosts=2)
    job.start(0, 1)
    two = job.wait_for_ranks(2)
    began = time.monotonic()
    os.kill(job.pids[0], signal.SIGSTOP)  # it hosts the store, whose answers time out after 10 s
    try:
        job.detected("the store's node is silent", began, lambda: "did not answer and is tried again" in job.log(), 60)
    finally:
        os.kill(job.pids[0], signal.SIGCONT)
    again = job.wait_for_ranks(2, two)  # each node alone would be a run of its own
    assert sorted(job.node_of(r) for r in again) == [0, 1]


@pytest.mark.slow
def test_ranks_that_the_batch_cannot_use_wait_and_a_user_error_ends_all(nodes, tmp_path):
    job = nodes("1:3", hosts=3, batch=8)  # two data ranks of 4 images, or one of 8
    job.start(0, 1, 2)
    two = job.wait_for_ranks(2)
    job.lose(job.node_of(two[1]))
    again = job.wait_for_ranks(2, two)  # the node that had no rank takes its place
    assert {job.node_of(r) for r in again} == set(job.pids)
    (tmp_path / "exit-0").write_text("1")  # a crash is restarted, three times at most
    job.wait_for_ranks(2, again)
    (tmp_path / "exit").write_text("2")
    assert {tuple(end) for end in job.ends().values()} == {(2, "")}


def test_too_few_nodes_are_an_error_that_names_the_number(nodes):
    job = nodes("2:2", hosts=2, join=5)
    job.start(0)
    ((status, why),) = job.ends().values()
    assert status == 86 and "fewer than 2 nodes joined within 5 s" in why and "--nodes MIN:MAX" in why
