"""Two processes and one run folder: the second is refused by name, and one that lost the folder writes nothing more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megastar.run_dir.layout import LEASE
from megastar.run_dir.lease import read_holder
from megastar.run_dir.status import status_of
from tests.integration.conftest import ROOT, environment, megastar

pytestmark = pytest.mark.dist


def start(config: Path, log: Path, *words: str) -> subprocess.Popen:
    """One process that trains, once it has done a step."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "megastar", "train", str(config), *words], cwd=ROOT, env=environment(), stdout=out,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 600  # on a machine that may be busy
        while not re.search(r"step \d+/", log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
    except BaseException:
        process.kill()
        raise
    return process


def contents(run: Path) -> dict[str, tuple[int, int]]:
    """Each file of the run that the process does not renew by itself: size and time."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != LEASE and "heartbeats" not in p.parts]
    return {str(p.relative_to(run)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def test_the_same_command_twice_is_refused_on_all_ranks(world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100_000, save_every=100_000, val_every=0)
    first = start(config, log)
    try:
        second = megastar("train", config, ranks=2, check=False)
        assert second.returncode == 2 and f"{run} is in use by megastar train (process {first.pid} on" in second.stderr
        assert second.stderr.count("in use by") == 1 and "Traceback" not in second.stderr, second.stderr
        assert f"process {first.pid} on" in status_of(run).holder
        assert [json.loads(x)["event"] for x in (run / "events.jsonl").read_text().splitlines()] == ["started"]
    finally:
        first.kill()
        first.wait()
    again = megastar("train", config, "train.steps=3", "train.save_every=3")
    assert f"was held by megastar train (process {first.pid} on" in again.stdout and "which has ended" in again.stdout
    events = [json.loads(x) for x in (run / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "warning", "started", "saved", "finished"]
    assert "taken over" in events[1]["text"] and not (run / LEASE).exists()


def test_a_run_that_lost_its_folder_ends_and_writes_nothing_more(world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100_000, save_every=100_000, val_every=0)
    first = start(config, log)
    try:
        os.kill(first.pid, 19)  # SIGSTOP: its host does not respond
        found = read_holder(run)
        other = replace(found[0], token="another", host="n7", machine="n7 b p", pid=4711)
        (run / LEASE).write_text(json.dumps(asdict(other)))
        os.kill(first.pid, 18)
        assert first.wait(300) == 2, log.read_text()[-3000:]
    finally:
        first.kill()
        first.wait()
    said = log.read_text()
    assert "was taken over by megastar train (process 4711 on n7" in said and "writes nothing more there" in said
    assert "Traceback" not in said and read_holder(run)[0].token == "another"
    assert [json.loads(x)["event"] for x in (run / "events.jsonl").read_text().splitlines()] == ["started"]
    assert not (run / "checkpoints").exists() or not list((run / "checkpoints").glob("step-*"))


def test_a_second_start_does_not_change_a_file(world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    config = world.write_config(tmp_path / "run.yaml", run, steps=100_000, save_every=100_000, val_every=0)
    first = start(config, log)
    try:
        os.kill(first.pid, 19)
        before = contents(run)
        assert megastar("train", config, "optim.lr=1", check=False).returncode == 2
        assert contents(run) == before
    finally:
        first.kill()
        first.wait()
