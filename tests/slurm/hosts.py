"""Hosts that fail, on a cluster of their own: the batch script and SLURM are real, the ranks only sleep."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.integration.conftest import ROOT, World
from tests.slurm.cluster import SIZE, Cluster, wait_for
from tests.slurm.settings import write_site

PATIENCE = 600


def fail_hosts(world: World, folder: Path) -> None:
    """Each crash excludes its host, as long as enough are left; a new job of the same run gives bad hosts back."""
    run, log = folder / "run", folder / "job.log"
    config = world.write_config(folder / "run.yaml", run)
    run.mkdir()
    (folder / "cluster").mkdir()

    with Cluster(folder / "cluster", nodes=4) as cluster:
        # The batch script's question for the run folder is answered.
        code = 'import os, sys, time; sys.argv[-1] == "--print-run-folder" and os.execvp(sys.argv[1], sys.argv[1:]); time.sleep(3000)'
        sleep = f"MEGASTAR_PREFIX=('{sys.executable}' -S -c '{code}')"
        cluster.env |= {"MEGASTAR_ENV": str(write_site(folder, sleep)), "MEGASTAR_BAD_HOST_CRASHES": "1"}

        def submit() -> str:
            return cluster.sbatch("--nodes=2", *SIZE, f"--output={log}", "slurm/train_b.sh", config, cwd=ROOT)

        def told() -> str:
            return cluster.run("scontrol", "show", "job", job, check=False) + log.read_text()[-3000:]

        def nodes_of_start(number: int) -> list[str]:
            """Once its ranks are there."""
            begun = f"megastar: job {job} (megastar-b), start {number}, on "
            wait_for(begun, PATIENCE, lambda: log.is_file() and begun in log.read_text(), told)
            wait_for("tasks", PATIENCE, lambda: len(cluster.tasks(job)) == 4, told)
            return log.read_text().rpartition(begun)[2].partition(" at ")[0].split()

        def crash(host: str) -> None:
            """A task of ``host`` is killed, then, for brevity, the ones that would have noticed."""
            before = log.read_text().count(f"srun: error: {host}: task")
            ranks = cluster.tasks(job)
            os.kill(next(t.pid for t in ranks if t.node == host), signal.SIGKILL)
            wait_for("word", PATIENCE, lambda: log.read_text().count(f"srun: error: {host}: task") > before, told)
            for t in cluster.tasks(job):
                os.kill(t.pid, signal.SIGKILL)

        def bad() -> list[str]:
            return [x.split()[2] for x in (run / "bad_hosts.log").read_text().splitlines()]

        job = submit()
        assert nodes_of_start(1) == ["n1", "n2"]
        cluster.kill_node(1)  # with the batch script: nobody is left to say why
        assert nodes_of_start(2) == ["n2", "n3"] and bad() == ["n1"], told()
        cluster.start_node(1)
        wait_for("n1", PATIENCE, lambda: cluster.idle() == 2, told)
        crash("n3")
        assert nodes_of_start(3) == ["n2", "n4"] and bad() == ["n1", "n3"], told()
        assert cluster.hosts(job, "ExcNodeList") == ["n1", "n3"]
        crash("n4")  # of four hosts three are bad: the first is taken again, or the job would wait for ever
        assert nodes_of_start(4) == ["n1", "n2"] and bad() == ["n1", "n3", "n4"], told()
        assert "n1 crashed too often but is not excluded: otherwise partition main has too few" in log.read_text()
        assert cluster.hosts(job, "ExcNodeList") == ["n3", "n4"]
        cluster.run("scancel", job)
        wait_for("the end", PATIENCE, lambda: cluster.state(job) == "CANCELLED" and cluster.idle() == 4, told)
        # A person forgives two of them; a new job is given the third, whom SLURM does not know to be bad.
        lines = (run / "bad_hosts.log").read_text().splitlines(keepends=True)
        (run / "bad_hosts.log").write_text(lines[0])
        job = submit()
        assert nodes_of_start(2) == ["n2", "n3"], told()
        assert "ended by a bad host in its allocation (n1), excluding n1; requeued" in log.read_text()
        assert cluster.hosts(job, "ExcNodeList") == ["n1"]
        cluster.run("scancel", job)
