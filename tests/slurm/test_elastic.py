"""MEGASTAR_ELASTIC on the real SLURM: nodes are lost, spare ones take their place, in the same start of the same job."""

from __future__ import annotations

import time

import numpy as np

from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from tests.elastic.nodes import losses, write_config
from tests.integration.conftest import ROOT, megastar
from tests.slurm.cluster import wait_for

STEPS, EVERY, PATIENCE = 40, 3, 900


def test_lost_nodes_are_replaced_within_the_job(cluster, world, tmp_path):
    run = tmp_path / "run"
    config = write_config(world, tmp_path / "run.yaml", run, steps=STEPS, save_every=1000)
    out = tmp_path / "job.log"
    job = cluster.sbatch(
        "--no-kill", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={out}",
        "slurm/train_b.sh", config, f"faults.memory_every={EVERY}", cwd=ROOT, MEGASTAR_ELASTIC="1:2",
    )  # fmt: skip

    def told() -> str:
        return f"{cluster.run('scontrol', 'show', 'job', job, check=False)}\n{out.read_text(errors='replace')[-6000:]}"

    def step() -> int:
        return max(losses(run), default=0)

    def hosts() -> list[str]:
        return [e["nodes"] for e in events("started", "resumed")][-1]

    def events(*kinds: str) -> list[dict]:
        return [e for e in read_events(run) if e["event"] in kinds]

    def lose(victim: str, most: int) -> float:
        """Seconds from the loss of a node to the next new step; at most so many steps are lost: the copy of the newest
        generation may still be on its way, and then the one before it counts."""
        first = step()
        wait_for("more steps", PATIENCE, lambda: step() >= first + EVERY, told)
        at, start = step(), time.monotonic()
        cluster.kill_node(int(victim[1:]))
        wait_for(f"a step after {at}", PATIENCE, lambda: step() > at, told)
        assert at - events("started", "resumed")[-1]["step"] <= most, told()
        assert cluster.job(job)["Restarts"] == "0" and cluster.state(job) == "RUNNING", told()
        return time.monotonic() - start

    try:
        wait_for("the first steps", PATIENCE, lambda: step() > EVERY, told)
        batch = cluster.job(job)["BatchHost"]
        other = next(host for host in hosts() if host != batch)
        took = [lose(other, 2 * EVERY - 1)]  # a spare node takes its place, with its copy in the other one's memory
        took.append(lose(batch, 2 * EVERY - 1))  # the node of the batch script
        print("seconds from the loss of a node to the next new step:", [round(t, 1) for t in took], flush=True)
        wait_for("the end", PATIENCE, lambda: events("finished"), told)
        # The batch script is gone: an agent hands the job back to SLURM, whose next start finds the run finished.
        wait_for("the requeue", PATIENCE, lambda: cluster.job(job)["Restarts"] == "1", told)
    finally:
        cluster.run("scancel", job, check=False)
        for i in range(1, 5):
            if f"n{i}" not in cluster.daemons:
                cluster.start_node(i)
        wait_for("nodes", 120, lambda: cluster.idle() == 4, told)
    reference = tmp_path / "straight"
    megastar("train", write_config(world, tmp_path / "s.yaml", reference, steps=STEPS, save_every=1000), ranks=2)
    expected, found = losses(reference), losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-5)
    assert len(status_of(run).mesh) >= 1
