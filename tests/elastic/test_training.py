"""Nodes that are lost and join in a run that really trains: `make test-elastic`. Its losses are those of a run that nothing
happened to: fp32, no dropout; other numbers of ranks add gradients in another order, so to a relative 1e-5.

Each fault prints the seconds from it to the next new step. A start of the ranks, mostly imports, is part of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megastar.run_dir.status import status_of
from tests.elastic.nodes import Job, losses, write_config
from tests.integration.conftest import ROOT, environment

pytestmark = [pytest.mark.dist, pytest.mark.slow]
EVERY, PATIENCE = 3, 600
PROFILE = "train.profile={start: 90000, steps: 1, ranks: [0, 2]}"  # of a rank that the loss of a node takes away
TRAIN = {"steps": 100_000, "global_batch": 12}  # longer than any test: it is ended by a signal


class Faults:
    """A job, what happened to it, and the losses that it had computed before."""

    def __init__(self, world, folder, save_every: int, hosts: int):
        self.world, self.folder, self.run = world, folder, folder / "run"
        config = write_config(world, folder / "run.yaml", self.run, save_every=save_every, **TRAIN)
        self.job = Job(config, self.run, "1:3", hosts, 1, f"faults.memory_every={EVERY}", PROFILE)
        self.computed: list[tuple[int, float]] = []
        self.job.start(0, 1, 2)

    def run_for(self, steps: int) -> None:
        first = self.job.step()
        self.job.wait_for(lambda: self.job.step() >= first + steps, PATIENCE)
        self.note()

    def note(self) -> None:
        self.at, self.starts = self.job.step(), self.job.starts()
        self.computed += losses(self.run).items()

    def after(self, fault: str, began: float, ranks: int) -> None:
        """The run has resumed, less than two generations back (the copies of the newest may be on their way), and done a step that
        it had not done before."""
        job, at, starts = self.job, self.at, self.starts
        job.wait_for(lambda: job.starts() > starts and job.events("resumed")[-1]["ranks"] == ranks, PATIENCE)
        lost = at - job.events("resumed")[-1]["step"]
        seconds = job.wait_for(lambda: job.step() > at, PATIENCE) - began
        print(f"{fault}: {max(0, lost)} step(s) lost, next new step after {seconds:.1f} s", flush=True)
        assert lost < 2 * EVERY, job.text()[-4000:]

    def end(self) -> None:
        """Stop as SLURM does; every loss, also of repeated steps, is that of one rank that nothing happens to."""
        for agent in self.job.agents.values():
            agent.terminate()
        assert set(self.job.end(PATIENCE).values()) == {85}, self.job.text()[-4000:]
        assert "rank 2 is not profiled, this start has the ranks 0 to 1" in self.job.text()
        found = losses(self.run)
        assert sorted(found) == list(range(1, max(found) + 1))
        folder = self.folder / "straight"
        config = write_config(self.world, self.folder / "straight.yaml", folder, save_every=1_000_000, **TRAIN)
        command = [sys.executable, "-m", "megastar", "train", str(config)]
        with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as straight:
            deadline = time.monotonic() + PATIENCE
            while max(losses(folder), default=0) < max(found) and time.monotonic() < deadline:
                time.sleep(0.1)
            straight.kill()
        expected = losses(folder)
        for step, loss in [*found.items(), *self.computed]:
            np.testing.assert_allclose(loss, expected[step], rtol=1e-5, err_msg=f"step {step}")


def test_losses_of_nodes_and_ranks_cost_few_steps_and_change_no_loss(world, tmp_path):
    faults = Faults(world, tmp_path, 1_000_000, hosts=4)
    with faults.job as job:
        faults.run_for(EVERY + 2)
        faults.after("loss of one of 3 nodes", job.lose(1), ranks=2)

        faults.run_for(2)
        job.start(3)
        job.wait_for(lambda: job.events("signal"), PATIENCE)  # the ranks have saved for it
        faults.note()
        faults.after("a node joins", time.monotonic(), ranks=3)

        faults.run_for(EVERY + 2)
        os.kill(job.pids(2)[0], signal.SIGKILL)
        faults.after("SIGKILL of a rank", time.monotonic(), ranks=3)

        faults.run_for(EVERY + 2)
        faults.after("loss of a node", job.lose(3), ranks=2)
        faults.note()
        faults.after("loss of the next, which kept the nodes' store", job.lose(0), ranks=1)
        faults.run_for(2)
        faults.end()
        assert len(job.events("lost")) >= 3 and len(job.events("mesh_changed")) == 4, job.text()[-4000:]
        assert "3 rank(s) on 3 node(s)" in "".join(status_of(faults.run).mesh)


def test_a_node_is_lost_while_a_checkpoint_is_written(world, tmp_path):
    faults = Faults(world, tmp_path, save_every=1, hosts=3)
    with faults.job as job:
        faults.run_for(EVERY + 2)
        job.wait_for(lambda: any((faults.run / "checkpoints/.writing").glob("*/*/*")), PATIENCE)
        faults.note()
        faults.after("loss of a node during a save", job.lose(1), ranks=2)
        faults.end()
