"""Kill -9 at random moments, also within saves, and start again: the losses are those of a run that nothing happened to.

Slow (minutes): `pytest -m slow tests/integration/run_folder/test_kills.py`. The seed of the moments is printed; MEGASTAR_KILL_SEED sets it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megastar.run_dir import checkpoint_dir
from megastar.run_dir.layout import LEASE
from tests.integration.conftest import ROOT, environment, megastar

STEPS, SAVE_EVERY = 60, 4
VICTIMS = ("all", "save", "rank 0", "save", "rank 1", "launcher", "save")
TIMES = ("images_per_s", "step_s", "data_wait_s", "save_blocked_s", "memory_gib", "slowest_rank", "slowest_ratio")


def rows(run: Path) -> list[dict]:
    """The rows of steps, timings aside, in file order."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found if "loss" in row]


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    found = {}
    for child in launcher.children():
        with suppress(psutil.Error, KeyError):
            found[int(child.environ()["RANK"])] = child
    return found


def wait(true: Callable[[], object], process: subprocess.Popen, seconds: float = 200.0) -> None:
    """Until ``true()`` or the end of ``process``."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_is_killed_at_random_moments_computes_the_same_losses(world, tmp_path):
    seed = int(os.environ.get("MEGASTAR_KILL_SEED", random.randrange(10**6)))
    print("MEGASTAR_KILL_SEED", seed)
    moments, train = random.Random(seed), {"steps": STEPS, "save_every": SAVE_EVERY, "val_every": 0}
    straight, run, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    megastar("train", world.write_config(tmp_path / "straight.yaml", straight, **train), ranks=2)
    config = world.write_config(tmp_path / "run.yaml", run, **train)
    words = [sys.executable, "-m", "megastar", "train", str(config), "--nproc", "2", "faults.lost_timeout=10"]
    for kind in VICTIMS:
        with log.open("w") as out:
            process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT)
        launcher = psutil.Process(process.pid)
        try:
            wait(lambda: " step " in log.read_text(), process)
            if kind == "save":
                wait(lambda: list(run.glob("checkpoints/.writing/*/*/*")), process)
                time.sleep(moments.uniform(0, 0.03))
            else:
                time.sleep(moments.uniform(0, 0.5))
            ranks = ranks_of(launcher) if process.poll() is None else {}
            everyone = [*ranks.values(), *([launcher] if process.poll() is None else [])]
            victims = everyone
            if kind.startswith("rank"):
                victims = [ranks[r] for r in ranks if r == int(kind[-1])]
            elif kind == "launcher":
                victims = [launcher]
            for victim in victims:
                with suppress(psutil.Error):
                    victim.send_signal(signal.SIGKILL)
            if kind == "launcher":  # its ranks may run on: a second start must not train beside them
                for rank in ranks.values():
                    with suppress(psutil.Error):
                        rank.send_signal(signal.SIGKILL)
            process.wait(120)
            psutil.wait_procs(everyone, 60)
        finally:
            process.kill()
            process.wait()
        found = checkpoint_dir.latest(run / "checkpoints")
        if found is not None:
            checkpoint_dir.verify(found)  # whatever was killed, the newest checkpoint is whole
    megastar("train", config, ranks=2)
    assert rows(run) == rows(straight), f"MEGASTAR_KILL_SEED={seed}"
    states = [
        json.loads((r / "checkpoints" / f"step-{STEPS:08d}" / "megastar.json").read_text()) for r in (run, straight)
    ]
    assert [s["step"] for s in states] == [STEPS, STEPS]
    left = [
        str(p.relative_to(run))
        for p in run.rglob("*")
        if p.name.endswith((".tmp", ".now", LEASE)) or ".writing" in p.parts
    ]
    assert not left
