"""Ranks that stop, die, fail or hang under the watchdog: which rank is named, and what is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.workers.watchdog_worker import AT, SCENARIOS, WORLD
from tests.integration.conftest import ROOT, environment


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """The folder of all scenarios, which went on side by side."""
    folder = tmp_path_factory.mktemp("watchdog")
    command = [sys.executable, "tests/dist/workers/watchdog_worker.py", str(folder), *SCENARIOS]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def output(folder: Path, rank: int) -> str:
    """What the rank wrote, without what torch's store may print of a connection that broke within an exchange."""
    lines = (folder / f"rank-{rank}.txt").read_text().splitlines()
    return "\n".join(x for x in lines if x.startswith(("megastar:", "error:", "raised:")) or "Traceback" in x)


def statuses(folder: Path) -> list[int]:
    return [int((folder / f"status-{rank}").read_text()) for rank in range(WORLD)]


def losses(folder: Path) -> list[tuple[int, str]]:
    path = folder / "lost.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(x["rank"], x["why"]) for x in found]


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("stopped", "has been silent for"),
        ("killed", "has closed its connections"),
        # Rank 0 keeps the store: its end is seen there, or at the end of who saw it first, whatever comes sooner.
        ("stopped-0", "has not responded for|has been silent for"),
        ("killed-0", "has not responded for|has closed its connections"),
    ],
)
def test_a_rank_that_is_gone_is_named_by_all_others(ended, name, sentence):
    folder, victim = ended / name, SCENARIOS[name].victim
    assert statuses(folder) == [-9 if r == victim else 86 for r in range(WORLD)]
    whole = ""
    for rank in {0, 1, 2} - {victim}:
        text = output(folder, rank)
        assert f"megastar: error: rank {victim} on " in text and re.search(sentence, text) and "\n" not in text, text
        (stacks,) = (folder / "stacks").glob(f"rank-{rank:05d}-*")
        assert f"rank {victim} on " in stacks.read_text() and "in loop" in stacks.read_text()
        whole += stacks.read_text()
    # The traceback of whoever was connected to it; in a ring the others may still wait for each other.
    assert "Connection" in whole or name.startswith("stopped")
    assert losses(folder) == [(victim, "lost")] and events(folder) == ["lost"]


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_by_all(ended):
    folder = ended / "hung"
    assert statuses(folder) == [86] * WORLD
    for rank in range(WORLD):
        text = output(folder, rank)
        assert (
            "megastar: error: no rank has made progress for" in text and "rank 1 on " in text and text.count("\n") == 0
        ), text
        assert f'is behind, at "waiting for data" of step {AT + 1}, {AT} collectives entered' in text
        (stacks,) = (folder / "stacks").glob(f"rank-{rank:05d}-*")
        assert ("in stuck_in_the_disk" in stacks.read_text()) == (rank == 1)
        last = stacks.read_text().splitlines()[-1]
        assert last.strip().startswith(f"{AT + (rank != 1)} gloo:all_reduce"), last
    assert losses(folder) == [(1, "hung")] and events(folder) == ["hang"]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["failed", "failed-0"])
def test_an_error_of_one_rank_is_reported_by_the_others(ended, name):
    """With its status: a user error must not be requeued."""
    folder, victim = ended / name, SCENARIOS[name].victim
    assert statuses(folder) == [2] * WORLD
    assert output(folder, victim) == "error: the shard is unreadable: fix it"
    for rank in {0, 1, 2} - {victim}:
        text = output(folder, rank)
        assert f"rank {victim} on " in text and "exited with an error: the shard is unreadable: fix it" in text
        assert text.count("\n") == 0, text
    assert losses(folder) == [] and events(folder) == ["error"]


@pytest.mark.dist
def test_ranks_that_were_suspended_together_continue(ended):
    folder = ended / "paused"
    assert statuses(folder) == [0] * WORLD and [output(folder, r) for r in range(WORLD)] == [""] * WORLD
    assert {p.name.split("-")[0] for p in folder.iterdir()} == {"heartbeats", "at", "rank", "status", "time"}
