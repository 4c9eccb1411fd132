"""Jobs besides the training, and what is not started again, on the real SLURM."""

from __future__ import annotations

from pathlib import Path

from tests.integration.conftest import ROOT
from tests.slurm.array import OVER, logs
from tests.slurm.cluster import SIZE, wait_for


def test_an_array_of_pretokenize_jobs_loses_a_task(array_that_loses_a_task):
    """It ran while the training waited for a node."""
    array_that_loses_a_task.result()


def test_hosts_that_fail_are_left_out_while_enough_are_left(hosts_that_fail):
    """It ran, without load, while the training did."""
    hosts_that_fail.result()


# Ranks that crash at once; the batch script's question for the run folder is answered.
BROKEN = """MEGASTAR_PREFIX=(sh -c 'case "$*" in *--print-run-folder) exec "$@";; esac; exit 1' prefix)\n"""


def test_what_is_not_started_again(cluster, world, tmp_path):
    """A user error: never requeued. A crash without progress: MEGASTAR_MAX_CRASHES times."""
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    (tmp_path / "run").mkdir()
    broken = tmp_path / "env.sh"
    broken.write_text(Path(cluster.env["MEGASTAR_ENV"]).read_text() + BROKEN)
    common = ("--nodes=1", *SIZE, f"--output={tmp_path}/%j.log", "slurm/train_b.sh")
    mistake = cluster.sbatch(*common, tmp_path / "nothing.yaml", cwd=ROOT)
    crash = cluster.sbatch(*common, config, cwd=ROOT, MEGASTAR_ENV=str(broken), MEGASTAR_MAX_CRASHES="1")
    for job in (mistake, crash):
        wait_for("the end", 180, lambda job=job: cluster.state(job) in OVER, lambda: logs(tmp_path))
        assert cluster.state(job) == "FAILED"
    assert cluster.job(mistake)["Restarts"] == "0" and cluster.job(mistake)["ExitCode"] == "2:0"
    assert "nothing.yaml cannot be read" in (tmp_path / f"{mistake}.log").read_text()
    assert cluster.job(crash)["Restarts"] == "1" and cluster.job(crash)["ExitCode"] == "1:0"
    log = (tmp_path / f"{crash}.log").read_text()
    assert log.count("ended by a crash (status 1)") == 2 and "not requeued: 1 earlier crashes" in log
    assert len((tmp_path / "run/requeues.log").read_text().splitlines()) == 2
