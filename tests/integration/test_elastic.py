"""Nodes that are lost and join in a run that really trains: `make test-elastic`. Its losses are those of a run that nothing
happened to: fp32, no dropout; other numbers of ranks add gradients in another order, so to a relative 1e-5.

Each test prints the seconds from a loss to the next new step. A start of the ranks, mostly imports, is part of them.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megastar.run_dir.status import status_of
from tests.integration.conftest import megastar
from tests.integration.helpers.elastic import Job, losses, write_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS, EVERY = 40, 3
PATIENCE = 600  # seconds, on a machine that may be busy


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> dict[int, float]:
    """The losses of three ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(world, folder / "run.yaml", folder / "run", steps=STEPS, save_every=1000, global_batch=12)
    megastar("train", config, ranks=3, timeout=PATIENCE)
    return losses(folder / "run")


class Faults:
    """What happens to a job, and what it cost: (fault, steps lost, seconds to the next new step)."""

    def __init__(self, job: Job):
        self.job, self.seen = job, {}
        self.costs: list[tuple[str, int, float]] = []

    def after(self, fault: str, began: float, ranks: int) -> None:
        """The run has resumed on ``ranks`` ranks and done a step that it had not done before."""
        job, at, starts = self.job, self.at, self.starts
        job.wait_for(lambda: job.starts() > starts and job.events("started", "resumed")[-1]["ranks"] == ranks, PATIENCE)
        lost = at - job.events("resumed")[-1]["step"]
        seconds = job.wait_for(lambda: job.step() > at, PATIENCE) - began
        self.costs.append((fault, lost, seconds))
        print(f"{fault}: {lost} step(s) lost, next new step after {seconds:.1f} s", flush=True)

    def run_for(self, steps: int) -> None:
        """Train ``steps`` more steps; remember where the run is."""
        first = self.job.step()
        self.job.wait_for(lambda: self.job.step() >= first + steps, PATIENCE)
        self.at, self.starts, found = self.job.step(), self.job.starts(), losses(self.job.run)
        self.seen |= {(step, round(loss, 12)): loss for step, loss in found.items()}

    def check(self, straight: dict[int, float], steps: int) -> None:
        """Every loss, also of steps that were repeated, is the straight run's."""
        final = losses(self.job.run)
        assert sorted(final) == list(range(1, steps + 1))
        for step, loss in [*final.items(), *((step, loss) for (step, _), loss in self.seen.items())]:
            np.testing.assert_allclose(loss, straight[step], rtol=1e-5, err_msg=f"step {step}")
        assert all(lost <= EVERY for _, lost, _ in self.costs), self.costs


def test_losses_of_nodes_and_ranks_cost_few_steps_and_change_no_loss(world, straight, tmp_path):
    run = tmp_path / "run"
    config = write_config(world, tmp_path / "run.yaml", run, steps=STEPS, save_every=1000, global_batch=12)
    with Job(config, run, "1:3", 5, 1, f"faults.memory_every={EVERY}") as job:
        faults = Faults(job)
        job.start(0, 1, 2)
        faults.run_for(EVERY + 2)

        victim = next(k for k in job.agents if k and job.pids(k))
        faults.after("loss of one of 3 nodes", job.lose(victim), ranks=2)

        faults.run_for(2)
        job.start(3)
        faults.after("a node joins", time.monotonic(), ranks=3)

        faults.run_for(EVERY + 2)
        os.kill(job.pids(0)[0], signal.SIGKILL)
        faults.after("SIGKILL of a rank", time.monotonic(), ranks=3)

        faults.run_for(EVERY + 2)
        began = job.lose(3)  # two in a row: the second while the ranks start again
        pids = [pid for k in job.agents for pid in job.pids(k)]
        job.wait_for(
            lambda: (now := [p for k in job.agents for p in job.pids(k)]) and not set(now) & set(pids), PATIENCE
        )
        job.lose(0)  # it has kept the nodes' store
        faults.after("loss of 2 nodes in a row", began, ranks=1)
        assert set(job.end(PATIENCE).values()) == {0}
        faults.check(straight, STEPS)
        assert len(job.events("lost")) >= 2 and len(job.events("mesh_changed")) >= 3, job.text()[-4000:]
        assert "3 rank(s) on 3 node(s)" in "".join(status_of(run).mesh)
    assert not [p for p in Path("/dev/shm").glob(f"megastar-{os.getuid()}-*") if job.text().count(str(p))]


def test_a_node_is_lost_while_a_checkpoint_is_written(world, straight, tmp_path):
    run = tmp_path / "run"
    config = write_config(world, tmp_path / "run.yaml", run, steps=30, save_every=1, global_batch=12)
    with Job(config, run, "1:3", 3, 1, f"faults.memory_every={EVERY}") as job:
        faults = Faults(job)
        job.start(0, 1, 2)
        faults.run_for(EVERY + 2)
        job.wait_for(lambda: any((run / "checkpoints/.writing").glob("*/*/*")), PATIENCE)
        faults.after("loss of a node during a save", job.lose(1), ranks=2)
        assert set(job.end(PATIENCE).values()) == {0}
        faults.check(straight, 30)
