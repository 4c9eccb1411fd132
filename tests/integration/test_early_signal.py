"""A signal in the first moments of a run, while Python imports: all ranks leave together, and nothing was begun."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import ROOT, environment
from tests.slurm.cluster import free_ports


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for ``number``."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.dist
def test_a_signal_during_the_imports_stops_all_ranks_before_the_first_step(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    port = free_ports(1)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks: list[subprocess.Popen] = []

    def start() -> None:
        rank = str(len(ranks))
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "megastar", "train", str(config)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=environment() | place | {"RANK": rank, "LOCAL_RANK": rank},
            )
        )  # fmt: skip

    try:
        deadline = time.monotonic() + 300
        start()  # rank 1 waits 10 s only for a rank 0 whose imports take longer
        while not psutil.Process(ranks[0].pid).net_connections("inet"):
            assert ranks[0].poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        start()
        while not listens(ranks[1].pid, signal.SIGUSR1):
            assert ranks[1].poll() is None and time.monotonic() < deadline
        assert "libtorch" not in Path(f"/proc/{ranks[1].pid}/maps").read_text(), "it listens too late"
        ranks[1].send_signal(signal.SIGUSR1)  # and not the other
        said = [r.communicate(timeout=250)[0] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    assert [r.returncode for r in ranks] == [85, 85], said
    assert "before the first step: nothing to save" in said[0] and "Traceback" not in said[0] + said[1]
    assert not (tmp_path / "run").exists()
