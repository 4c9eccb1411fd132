"""Launchers of one machine: what listens, what a stranger in the store can do, and signals to a launcher."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import read_events
from tests.integration.conftest import ROOT, environment
from tests.integration.test_watchdog import Run
from tests.slurm.cluster import free_ports

pytestmark = [pytest.mark.dist, pytest.mark.long]


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def listening(pid: int) -> set[tuple[str, int]]:
    found = set()
    for process in family(pid):
        found |= {tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def attack(port: int, marker: Path) -> int:
    """Overwrite megastar's values in the store with a pickle, or with a heartbeat that ends the run; how many."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    keys = [key for key in store.list_keys() if "megastar" in key]
    for key in keys:
        store.set(key, pickle.dumps(Evil(marker)))
        if "beats" in key:
            beat = {"rank": int(key[-1]), "host": "h", "pid": 1, "flag": "E", "status": 3, "text": "I end this run"}
            store.set(key, "E" + json.dumps(beat))
    return len(keys)


@pytest.fixture
def training(world, tmp_path, monkeypatch):
    """Starts two ranks that train until they are stopped, with a folder of their own for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    started = []

    def start(*command: str, **more: str) -> Run:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        run = tmp_path / "run"
        fields = {"steps": 100_000, "save_every": 100_000, "val_every": 0}
        config = world.write_config(tmp_path / "run.yaml", run, **fields)
        words = [str(config) if w == "CONFIG" else w for w in command]
        started.append(Run(run, *words))
        started[0].wait_for(lambda: started[0].steps() >= 2)
        return started[0]

    yield start
    for run in started:
        with suppress(psutil.NoSuchProcess):
            for process in family(run.process.pid):
                process.kill()


def test_a_local_launch_is_closed_to_others_and_saves_when_its_terminal_closes(training, tmp_path):
    run = training("megastar", "train", "CONFIG", "--nproc", "2", "faults.lost_timeout=4", MASTER_PORT="1")
    pid, marker = run.process.pid, tmp_path / "unpickled"
    addresses = listening(pid)
    assert addresses and {host for host, _ in addresses} == {"127.0.0.1"}
    port = int(family(pid)[1].environ()["MASTER_PORT"])
    begin = time.monotonic()
    while time.monotonic() - begin < 8:  # longer than faults.lost_timeout
        assert run.process.poll() is None, run.end()
        assert attack(port, marker) >= 2
    run.process.send_signal(signal.SIGTSTP)
    time.sleep(6)
    at = run.steps()
    run.process.send_signal(signal.SIGCONT)
    run.wait_for(lambda: run.steps() >= at + 3)
    run.process.send_signal(signal.SIGHUP)
    out = run.end()
    assert run.process.returncode == 128 + signal.SIGHUP, out[-4000:]
    assert not marker.exists() and "I end this run" not in out and "Traceback" not in out
    assert "ignoring a value of megastar/beats/" in out
    assert checkpoint_dir.latest(run.run / "checkpoints") is not None
    assert read_events(run.run)[-1]["event"] == "signal"
    assert not [p for p in (tmp_path / "tmp").iterdir() if "elastic" in p.name]


LAUNCHERS = {  # the deepspeed command's child starts the ranks and goes on without it
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=2", "PORT", "--module", "megastar"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "megastar"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_save_when_their_launcher_is_killed(training, launcher):
    words = [f"--master_port={free_ports(1)}" if w == "PORT" else w for w in LAUNCHERS[launcher]]
    run = training(*words, "train", "CONFIG", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    processes = family(run.process.pid)
    if launcher == "deepspeed":
        assert {host for host, _ in listening(run.process.pid)} <= {"127.0.0.1"}
    run.process.kill()
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive and "Traceback" not in run.end()
    assert checkpoint_dir.latest(run.run / "checkpoints") is not None
    assert read_events(run.run)[-1]["event"] == "signal"


def test_an_error_of_rank_0_ends_all_ranks_with_one_sentence(world, tmp_path):
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "gone" / "away")
    config = world.write_config(tmp_path / "run.yaml", run)
    words = [sys.executable, "-m", "tests.forker", "2", "-m", "megastar", "train", str(config)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and str(run) in lines[0] and "Traceback" not in done.stderr, done.stderr
