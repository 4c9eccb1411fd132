"""A run that everything happens to: each test is one more fault of the same run, and the run's next start.

The launchers are those of slurm/, the nodes are real slurmd, 2 nodes x 2 tasks over gloo. Between two faults the ranks
are stopped (SIGSTOP), so that no step passes unseen and no processor is busy. Every loss of every step, however often
it was computed, must be that of four local processes which nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megastar.run_dir import checkpoint_dir
from megastar.run_dir.status import status_of
from tests.integration.conftest import ROOT, World, megastar
from tests.slurm.cluster import SIZE, Cluster, wait_for
from tests.slurm.conftest import Behind

STEPS, SAVE_EVERY = 30, 5
PATIENCE = 600  # seconds for a start: the imports of four processes, on a machine that may be busy
TIMES = ("images_per_s", "step_s", "data_wait_s", "save_blocked_s", "memory_gib", "slowest_rank", "slowest_ratio")


def rows(run: Path) -> dict[int, dict]:
    """Step -> its row of metrics, timings aside."""
    path = run / "metrics.jsonl"
    whole = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] if path.is_file() else []
    found = [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in whole]
    return {row["step"]: row for row in found if "loss" in row}


class Training:
    """The run and its present job."""

    def __init__(self, cluster: Cluster, world: World, folder: Path):
        self.cluster, self.world, self.folder, self.run = cluster, world, folder, folder / "run"
        self.config = world.write_config(
            folder / "run.yaml", self.run, steps=STEPS, save_every=SAVE_EVERY, val_every=0, keep_last=2
        )
        self.job = ""
        self.computed: list[dict] = []  # every row that was seen, also those that a resumed run cuts off

    def submit(self) -> str:
        out = f"--output={self.folder}/%x-%j.log"
        self.job = self.cluster.sbatch("--nodes=2", *SIZE, out, "slurm/train_b.sh", self.config, cwd=ROOT)
        return self.job

    def log(self) -> str:
        return "".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("*.log")))

    def told(self) -> str:
        return f"{self.cluster.run('scontrol', 'show', 'job', self.job, check=False)}\n{self.log()[-4000:]}"

    def last(self) -> int:
        now = rows(self.run)
        self.computed += now.values()
        return max(now, default=0)

    def pids(self) -> list[int]:
        return [t.pid for t in self.cluster.tasks(self.job)]

    def send(self, number: signal.Signals, pids: list[int] | None = None) -> None:
        for pid in self.pids() if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def hold_after(self, steps: int) -> int:
        """Stop all ranks once the job's present start has done ``steps``; the last step. Submits where there is no job."""
        if not self.job or self.over():
            self.submit()
        wait_for("a step", PATIENCE, lambda: self.steps_since_start() or self.over(), self.told)
        pids = self.pids()  # now: it takes as long as a step, on a fast machine
        wait_for(f"{steps} steps", PATIENCE, lambda: self.steps_since_start() >= steps, self.told, every=0.005)
        self.send(signal.SIGSTOP, pids)
        assert len(pids) == 4 and self.last() < STEPS, f"{pids}, step {self.last()}: too late\n{self.told()}"
        return self.last()

    def steps_since_start(self) -> int:
        """Of the newest start in the log, whose first step has a line."""
        log = self.folder / f"megastar-b-{self.job}.log"
        text = log.read_text(errors="replace") if log.is_file() else ""
        first = re.search(rf"step (\d+)/{STEPS} ", text.rpartition(f"megastar: job {self.job} (")[2])
        return self.last() - int(first[1]) + 1 if first else 0

    def bad_hosts(self) -> list[str]:
        path = self.run / "bad_hosts.log"
        return path.read_text().splitlines() if path.is_file() else []

    def over(self) -> bool:
        return self.cluster.state(self.job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "GONE")

    def wait_for_start(self, number: int) -> None:
        """The job's ``number``-th start, counted from 1."""
        told = f"job {self.job} (megastar-b), start {number}, on"
        wait_for(f"start {number}", PATIENCE, lambda: told in self.log() or self.over(), self.told)
        assert told in self.log(), self.told()

    def starts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"]) + 1

    def saved(self) -> int:
        found = checkpoint_dir.latest(self.run / "checkpoints")
        return checkpoint_dir.step_in(found) if found else 0


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Iterator[Behind]:
    """The rows of four local processes that nothing happens to; they run while the processors wait for SLURM."""
    folder = tmp_path_factory.mktemp("straight")
    config = world.write_config(folder / "run.yaml", folder / "run", steps=STEPS, save_every=1000, val_every=0)

    def rows_of_it() -> dict[int, dict]:
        megastar("train", config, ranks=4, timeout=2 * PATIENCE)
        return rows(folder / "run")

    with Behind(rows_of_it) as behind:
        yield behind


@pytest.fixture(scope="module")
def training(cluster, world, tmp_path_factory) -> Iterator[Training]:
    t = Training(cluster, world, tmp_path_factory.mktemp("training"))
    yield t
    if t.job and not t.over():
        cluster.run("scancel", t.job)


def sample_after(training: Training, npz: Path) -> str:
    """slurm/sample_fid.sh, which waits for the training job; pictures of 16 x 16."""
    few = (
        "--tokenizer",
        training.world.tokenizer,
        "--count",
        "9",
        "--per-class",
        "1",
        "--out",
        npz.with_suffix(".png"),
    )
    out = f"--output={training.folder}/%x-%j.log"
    words = ("slurm/sample_fid.sh", training.run, "--npz", npz, *few)
    return training.cluster.sbatch(*SIZE, f"--dependency=afterok:{training.job}", out, *words, cwd=ROOT)


@pytest.fixture(scope="module")
def sampling(training, tmp_path_factory) -> tuple[str, Path]:
    """A job that waits for the second training job from its beginning, through all its requeues."""
    npz = tmp_path_factory.mktemp("sampling") / "s.npz"
    if not training.job:  # this test alone
        training.submit()
    return sample_after(training, npz), npz


def test_cancelled_during_a_save(training, hosts_that_fail):
    """scancel ends a job for good, a half-written checkpoint does not count, a job that waited for it ends too."""
    hosts_that_fail.start()
    training.hold_after(SAVE_EVERY - 1)
    waits = sample_after(training, training.folder / "never.npz")
    writing, pids = training.run / "checkpoints/.writing", training.pids()  # finding them takes longer than a save
    training.send(signal.SIGCONT, pids)
    deadline = time.monotonic() + 60
    while not any(writing.glob("*")):
        assert time.monotonic() < deadline, training.told()
    training.send(signal.SIGSTOP, pids)
    assert any(writing.glob("*")), "the save was over before the ranks stopped: the test proves nothing"
    first = training.job
    training.cluster.run("scancel", first)
    wait_for(
        "the cancel",
        PATIENCE,
        lambda: training.cluster.state(first) == "CANCELLED" and not training.pids(),
        training.told,
    )
    wait_for(
        "the end of what waited for it", PATIENCE, lambda: training.cluster.state(waits) == "CANCELLED", training.told
    )
    assert training.cluster.job(first)["Restarts"] == "0"
    assert training.submit() != first


def test_scontrol_requeue(training, sampling):
    stopped = training.hold_after(2)
    training.cluster.run("scontrol", "requeue", training.job)
    training.send(signal.SIGCONT)
    training.wait_for_start(2)
    assert training.saved() >= stopped, "what TERM asked for was not saved"


def test_preempted_by_a_higher_partition(training):
    stopped, start = training.hold_after(2), training.starts()
    urgent = training.cluster.sbatch(
        "-p", "urgent", "-N4", "--exclusive", f"--output={training.folder}/urgent.out", "--wrap", "hostname", cwd=ROOT
    )
    training.send(signal.SIGCONT)
    training.wait_for_start(start + 1)
    done = ("COMPLETING", "COMPLETED")  # the first where a node of it is not free yet
    assert training.cluster.state(urgent) in done
    wait_for("urgent", PATIENCE, lambda: training.cluster.state(urgent) == "COMPLETED", training.told)
    assert training.saved() >= stopped, "what the signal asked for was not saved"


def second_node(training: Training) -> str:
    """Not the first one, on which the batch script runs."""
    return training.cluster.hosts(training.job, "NodeList")[1]


def test_one_rank_is_killed(training):
    stopped, start, host = training.hold_after(2), training.starts(), second_node(training)
    os.kill(training.pids()[3], signal.SIGKILL)
    training.send(signal.SIGCONT)
    training.wait_for_start(start + 1)
    ended = (training.run / "requeues.log").read_text().splitlines()[-1]
    assert f"ended by a crash (status 137), host {host}, checkpoint" in ended
    assert stopped - training.saved() <= SAVE_EVERY


def test_a_host_that_fails_twice_is_left_out(training):
    """This time while Python starts. The job that goes on has other nodes; the run ends on them with every loss right."""
    start, bad = training.starts(), second_node(training)
    assert [x.split()[2] for x in training.bad_hosts()] == [bad], "SLURM gave the job other nodes than before"
    wait_for("tasks", PATIENCE, lambda: len(training.pids()) == 4, training.told)
    pids = training.pids()
    os.kill(pids[3], signal.SIGKILL)
    wait_for(
        "srun's word", PATIENCE, lambda: training.log().count(f"srun: error: {bad}: task 3: Killed") == 2, training.told
    )
    training.send(signal.SIGKILL, pids[:3])
    training.wait_for_start(start + 1)
    assert [x.split()[2] for x in training.bad_hosts()] == [bad, bad]
    assert training.cluster.hosts(training.job, "ExcNodeList") == [bad]
    assert bad not in training.cluster.hosts(training.job, "NodeList")
    assert f", excluding {bad}, checkpoint" in (training.run / "requeues.log").read_text()
    assert status_of(training.run).excluded == [bad]


def test_time_limit(training, straight):
    """SLURM looks at the clock every 30 s; the script asks for USR1 180 s before the end."""
    stopped, start = training.hold_after(2), training.starts()
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=3")
    straight.start()
    usr1, pids = 1 << (signal.SIGUSR1 - 1), training.pids()

    def requeued() -> bool:
        for pid in pids:
            with suppress(OSError):  # it is gone
                if int(re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[0], 16) & usr1:
                    os.kill(pid, signal.SIGCONT)
        return training.starts() > start

    wait_for("the requeue", PATIENCE, requeued, training.told)
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=60")
    training.wait_for_start(start + 1)
    assert training.saved() >= stopped, "what USR1 asked for was not saved"


def test_a_node_dies(training, array_that_loses_a_task):
    """Not the first one, on which the batch script runs. It comes back when SLURM has given it up."""
    stopped, start, node = training.hold_after(2), training.starts(), second_node(training)
    training.cluster.kill_node(int(node[1:]))
    array_that_loses_a_task.start()
    training.send(signal.SIGCONT)
    wait_for("the requeue", PATIENCE, lambda: training.starts() > start, training.told)
    training.cluster.start_node(int(node[1:]))
    training.wait_for_start(start + 1)
    assert stopped - training.saved() <= SAVE_EVERY
    wait_for("the blame", PATIENCE, lambda: f" {node} job" in training.bad_hosts()[-1], training.told)


def test_every_loss_is_that_of_four_local_processes(training, straight, cluster):
    """None lost; those that were computed more than once are equal."""
    training.hold_after(1)
    training.send(signal.SIGCONT)
    wait_for("the end", PATIENCE, training.over, training.told)
    assert training.cluster.state(training.job) == "COMPLETED", training.told()
    done, expected = rows(training.run), straight.result()
    assert done == expected and sorted(done) == list(range(1, STEPS + 1))
    for row in training.computed:
        assert row == expected[row["step"]]
    checkpoint_dir.verify(training.run / f"checkpoints/step-{STEPS:08d}")


def test_sampling_starts_after_the_training(training, sampling, cluster):
    job, npz = sampling
    if not training.over():
        wait_for("the end", PATIENCE, training.over, training.told)
    wait_for(
        "the pictures", PATIENCE, lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), training.told
    )
    assert (cluster.state(job), cluster.job(job)["Restarts"]) == ("COMPLETED", "0"), training.log()[-3000:]
    assert np.load(npz)["arr_0"].shape == (9, 16, 16, 3)
