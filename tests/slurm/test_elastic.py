"""MEGASTAR_ELASTIC on the real SLURM: nodes are lost, spare ones take their place, in the same start of the same job."""

from __future__ import annotations

import time

import numpy as np

from megastar.run_dir.status import status_of
from tests.integration.conftest import ROOT, megastar
from tests.integration.helpers.elastic import losses, write_config
from tests.slurm.cluster import wait_for

STEPS, EVERY, PATIENCE = 60, 3, 900
LIMIT = 60.0  # seconds from a loss to the next new step


def test_lost_nodes_are_replaced_within_the_job(cluster, world, tmp_path):
    run = tmp_path / "run"
    config = write_config(world, tmp_path / "run.yaml", run, steps=STEPS, save_every=1000)
    out = tmp_path / "job.log"
    job = cluster.sbatch(
        "--no-kill", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={out}",
        "slurm/train_b.sh", config, f"faults.memory_every={EVERY}", cwd=ROOT, MEGASTAR_ELASTIC="1:2",
    )  # fmt: skip

    def told() -> str:
        return f"{cluster.job(job)}\n{out.read_text(errors='replace')[-6000:]}"

    def step() -> int:
        return max(losses(run), default=0)

    def hosts() -> list[str]:
        return [e["nodes"] for e in status_events(run) if "nodes" in e][-1]

    took = []
    try:
        wait_for("the first steps", PATIENCE, lambda: step() > EVERY, told)
        # First another node than that of the batch script, whose loss SLURM's own steps survive; then that one.
        order = sorted(hosts(), key=lambda n: n == cluster.job(job)["BatchHost"])
        for victim in (order[0], cluster.job(job)["BatchHost"]):
            wait_for("more steps", PATIENCE, lambda first=step(): step() >= first + EVERY, told)
            at = step()
            cluster.kill_node(int(victim[1:]))
            lost_at = time.monotonic()
            wait_for(f"a step after {at}", PATIENCE, lambda: step() > at, told)
            took.append(time.monotonic() - lost_at)
            resumed = status_events(run, "resumed")[-1]["step"]
            if victim in order:
                assert at - resumed <= EVERY, told()
            assert cluster.job(job)["Restarts"] == "0" and cluster.state(job) == "RUNNING", told()
        print("seconds from the loss of a node to the next new step:", [round(t, 1) for t in took], flush=True)
        wait_for("the end", PATIENCE, lambda: "finished" in [e["event"] for e in status_events(run)], told)
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


def status_events(run, *kinds: str) -> list[dict]:
    from megastar.run_dir.events import read_events

    return [e for e in read_events(run) if not kinds or e["event"] in kinds]
