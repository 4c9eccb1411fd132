"""A rank that dies, ranks that were suspended, a rank that hangs: in a run that really trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from tests.integration.conftest import ROOT, environment
from tests.integration.test_train import rows

pytestmark = [pytest.mark.dist, pytest.mark.long]

FAULTS = ("faults.hang_timeout=6", "faults.lost_timeout=6")
SUSPENDED_S = 8.0  # longer than either


class Run:
    """A command that starts two ranks, in a session of its own."""

    def __init__(self, run: Path, *command: str):
        self.run = run
        words = [sys.executable, "-m", *command]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def steps(self) -> int:
        return max(rows(self.run), default=0) if (self.run / "metrics.jsonl").is_file() else 0

    def wait_for(self, what: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and self.process.poll() is None, self.end()
            time.sleep(0.02)

    def heartbeats(self) -> dict[int, dict]:
        return {n: json.loads((self.run / f"heartbeats/rank-{n:05d}.json").read_text()) for n in range(2)}

    def end(self, seconds: float = 100) -> str:
        try:
            return self.process.communicate(timeout=seconds)[0]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "lost.jsonl").read_text().splitlines()]


def test_ranks_that_were_suspended_go_on_and_one_that_dies_is_named(world, tmp_path):
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100_000, save_every=100_000, val_every=0)
    training = Run(run, "megastar", "train", str(config), "--nproc", "2", *FAULTS)
    training.wait_for(lambda: training.steps() >= 3)
    pids = [beat["pid"] for beat in training.heartbeats().values()]
    for number, seconds in ((signal.SIGSTOP, SUSPENDED_S), (signal.SIGCONT, 0.0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(seconds)
    at = training.steps()
    training.wait_for(lambda: training.steps() >= at + 5)

    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    out = training.end()
    assert training.process.returncode != 0 and time.monotonic() - killed < 60
    host = training.heartbeats()[1]["host"]
    said = [line for line in out.splitlines() if "megastar: error:" in line]
    assert len(said) == 2 and f"rank 1 on {host} (pid {pids[1]}) has been silent for" in said[0], out[-4000:]
    assert "rank 1 was killed by SIGKILL" in said[1] and "Traceback" not in out, out[-4000:]
    assert [(x["rank"], x["host"], x["why"], x["attempt"]) for x in losses(run)] == [(1, host, "lost", 0)]
    (stacks,) = (run / "stacks").iterdir()
    assert stacks.name.startswith("rank-00000-") and "gloo" in stacks.read_text()
    assert read_events(run)[-1]["event"] == "lost"
    status = status_of(run)
    assert status.state == "stopped" and f"rank 1 on {host}" in status.why and "2 rank(s)" in status.ranks


def test_a_rank_that_hangs_is_named_and_its_stacks_are_written(world, tmp_path):
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100, val_every=0)
    script = str(Path(__file__).parent / "helpers/slow_rank.py")
    training = Run(run, "tests.forker", "2", script, str(config), *FAULTS)
    out = training.end(300)
    said = [line for line in out.splitlines() if "megastar: error:" in line]
    assert training.process.returncode != 0 and len(said) == 2, out[-4000:]
    for line in said:
        assert (
            "no rank has made progress for" in line
            and "rank 1 on" in line
            and 'is behind, at "backward" of step 8' in line
        )
    sleeper, waiting = sorted((run / "stacks").iterdir(), key=lambda p: "rank-00000-" in p.name)
    assert "in asleep_for_ever" in sleeper.read_text() and "in asleep_for_ever" not in waiting.read_text()
    assert "gloo:all" in waiting.read_text() and ": scheduled" in waiting.read_text()
    assert [(x["rank"], x["why"]) for x in losses(run)] == [(1, "hung")]
    assert [e["event"] for e in read_events(run)].count("hang") == 1 and max(rows(run)) == 7
    assert status_of(run).state == "stopped" and "no rank has made progress" in status_of(run).why
