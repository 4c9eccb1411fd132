"""Jobs besides the training, and what is not started again, on the real SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.dist.test_tokenizer import CONFIG, events_of, rows_of, write_images
from tests.integration.conftest import ROOT, environment, megastar
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
        wait_for("the end", 400, lambda job=job: cluster.state(job) in OVER, lambda: logs(tmp_path))
        assert cluster.state(job) == "FAILED"
    assert cluster.job(mistake)["Restarts"] == "0" and cluster.job(mistake)["ExitCode"] == "2:0"
    assert "nothing.yaml cannot be read" in (tmp_path / f"{mistake}.log").read_text()
    assert cluster.job(crash)["Restarts"] == "1" and cluster.job(crash)["ExitCode"] == "1:0"
    log = (tmp_path / f"{crash}.log").read_text()
    assert log.count("ended by a crash (status 1)") == 2 and "not requeued: 1 earlier crashes" in log
    assert len((tmp_path / "run/requeues.log").read_text().splitlines()) == 2


def test_the_training_of_a_tokenizer_goes_on_after_a_signal(cluster, tmp_path):
    """Two nodes; USR1, as before a time limit: saved, requeued, each step once, the first steps those of one process."""
    steps, out, config = 150, tmp_path / "out", tmp_path / "vq.yaml"
    pictures = str(write_images(tmp_path / "images"))
    same = {"schedule": "constant", "revive_every": 0}  # whatever the number of steps
    config.write_text(yaml.safe_dump(CONFIG | {"pictures": pictures, "steps": steps, "save_every": 1000, **same}))
    log = f"--output={tmp_path}/%j.log"
    job = cluster.sbatch("--nodes=2", *SIZE, log, "slurm/train_tokenizer.sh", config, f"out={out}", cwd=ROOT)
    wait_for(
        "steps",
        300,
        lambda: (out / "metrics.jsonl").is_file() and len(rows_of(out)) > 8,
        lambda: logs(tmp_path),
        every=0.02,
    )
    for task in cluster.tasks(job):
        with suppress(ProcessLookupError):
            os.kill(task.pid, signal.SIGUSR1)
    wait_for("the end", 300, lambda: cluster.state(job) in OVER, lambda: logs(tmp_path))
    assert cluster.state(job) == "COMPLETED" and cluster.job(job)["Restarts"] == "1", logs(tmp_path)[-3000:]
    assert [row["step"] for row in rows_of(out)] == list(range(1, steps + 1))
    assert events_of(out).count("signal") == 1
    megastar("train-tokenizer", config, f"out={tmp_path / 'one'}", "steps=8")
    for one, row in zip(rows_of(tmp_path / "one"), rows_of(out), strict=False):
        assert row["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_the_benchmark_of_faults_runs(tmp_path):
    """benchmarks/faults.py on a cluster of its own; its times mean nothing here."""
    command = [sys.executable, "benchmarks/faults.py", "--only", "NaN"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "NaN, skipped: " in done.stdout and "three NaN, rollback: " in done.stdout
