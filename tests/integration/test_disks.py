"""Runs on two ranks whose disk fills, with a rank that is slow: what the run folders say afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megastar.engine.fault_tolerance.stragglers import ROWS
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import open_situations, read_events
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.status import status_of
from tests.disks import with_disks
from tests.integration.test_train import rows

pytestmark = [pytest.mark.dist, pytest.mark.long]

STEPS, FULL, FREE = 36, 13, 25  # the disk is full from before the step with index FULL to before that with index FREE
BAD = (45, 46, 47)  # batches without a loss, so that the run goes back, while the disk is full
SLOW = 10  # steps in which rank 1 takes four times as long


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disks")
    config = world.write_config(folder / "run.yaml", folder / "disk/run", save_every=4, val_every=100)
    disks = {folder / "disk": "64m", folder / "other": "1m"}
    words = ["-m", "tests.integration.helpers.disk_worker", config, *disks, folder / "out"]
    done = with_disks(disks, "-m", "tests.forker", 2, *words)
    (folder / "out/said").write_text(done.stdout + done.stderr)
    return folder / "out"


def raised(run: Path) -> str:
    return json.loads((run / "raised.json").read_text())


def told(run: Path, situation: str) -> list[dict]:
    return [e for e in read_events(run) if str(e.get("situation", "")).startswith(situation)]


def test_a_disk_that_is_freed_in_time_costs_nothing(runs, whole):
    run = runs / "freed"
    assert raised(run) == ""
    done = rows(run)
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    for step, row in rows(whole).items():  # the same numbers as where nothing happened
        assert done[step]["loss"] == row["loss"]
    assert checkpoint_dir.latest(run / "checkpoints").name == checkpoint_dir.name_of(STEPS)
    checkpoint_dir.verify(run / "checkpoints" / checkpoint_dir.name_of(STEPS))
    failed, over = told(run, "save")
    assert failed["step"] == 16 and "step-00000012 stays valid" in failed["text"] and "are free" in failed["text"]
    again = re.search(r"step-(\d+) is written, after \d+ failed attempts", over["text"])
    assert over["over"] and FREE < int(again[1]) < 28  # before the next save point
    assert [bool(e.get("over")) for e in told(run, "disk")] == [False, True]
    assert FULL < told(run, "disk")[0]["step"] < FREE <= told(run, "disk")[1]["step"]


def test_a_slow_rank_is_named_until_it_keeps_up(runs):
    run = runs / "freed"
    lines = {r["step"]: r for r in read_jsonl(run / "metrics.jsonl") if "loss" in r}
    assert all(lines[n]["slowest_rank"] == 1 and lines[n]["slowest_ratio"] > 2 for n in range(2, SLOW))
    named, over = told(run, "slow")
    assert named["event"] == "slow" and (named["rank"], named["why"], named["gpu"]) == (1, "compute", None)
    assert f"rank 1 on {named['slow_host']} computes slowly" in named["text"] and "megastar doctor" in named["text"]
    assert over["over"] and ROWS <= named["step"] <= SLOW < over["step"]
    assert all(line["data_wait_s"] >= 0 for line in lines.values())


def test_a_disk_that_stays_full_ends_the_run_with_a_sentence(runs):
    text = raised(runs / "full")
    assert (
        f"checkpoint of step {STEPS + 4} in " in text and f"step-{STEPS:08d} stays valid: free some disk space" in text
    )
    assert text.endswith("run the same command again")
    assert checkpoint_dir.latest(runs / "full/checkpoints").name == checkpoint_dir.name_of(STEPS)
    checkpoint_dir.verify(runs / "full/checkpoints" / checkpoint_dir.name_of(STEPS))
    assert not (runs / "full/checkpoints/.writing").exists()


def test_a_signal_while_the_last_save_is_tried_again_ends_it_to_be_requeued(runs):
    run = runs / "signalled"
    assert raised(run) == "status 85" and checkpoint_dir.latest(run / "checkpoints").name == checkpoint_dir.name_of(
        STEPS
    )
    assert [e for e in read_events(run) if e["event"] == "signal"][-1]["text"].endswith("the same command resumes")


def test_one_rank_whose_disk_is_full_keeps_a_checkpoint_from_counting(runs):
    text = raised(runs / "one_rank")
    assert "rank 1: " in text and "No space left on device" in text and f"step-{STEPS:08d} stays valid" in text
    assert sorted(p.name for p in (runs / "one_rank/checkpoints").glob("step-*"))[-1] == checkpoint_dir.name_of(STEPS)
    assert not (runs / "one_rank/checkpoints/.writing").exists()


def test_a_roll_back_waits_for_room(runs):
    run = runs / "back"
    assert raised(run) == "" and "No space left on device; retrying for 600 s" in (runs / "said").read_text()
    (back,) = read_jsonl(run / "rollbacks.jsonl")
    assert (back["step"], back["to"], back["position"]) == (BAD[-1], "step-00000044", BAD[-1] + 1)
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 13))
    assert [e["left"] for e in read_events(run) if e["event"] == "rolled_back"] == [BAD[-1]]
    checkpoint_dir.verify(run / "checkpoints" / checkpoint_dir.name_of(STEPS + 12))


def test_with_room_again_the_same_command_ends_the_run(runs):
    run = runs / "resumed"
    assert raised(run) == ""
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 5))
    checkpoint_dir.verify(run / "checkpoints" / checkpoint_dir.name_of(STEPS + 4))
    status = status_of(run)
    assert status.state == "finished" and open_situations(read_events(run)) == []
    assert [w for w in status.restarts if "could not be written" in w]
