"""The heartbeat that a rank writes into the run folder, and what ``status`` reads from it."""

from __future__ import annotations

import json
import threading
import time

import pytest

from megastar.engine.fault_tolerance.heartbeat import ALIVE, EXITED, Heartbeat
from megastar.engine.fault_tolerance.watchdog import Watchdog, watch
from megastar.engine.phase import PHASE
from megastar.run_dir.status import describe_heartbeats
from tests.unit.engine.test_watchdog import config


@pytest.fixture(autouse=True)
def fresh():
    PHASE.reset()
    yield
    PHASE.reset()


def test_the_heartbeat_file_and_its_line_in_status(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    cfg = config()
    cfg.run = str(tmp_path)
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats/rank-00007.json").write_text("{}")  # of a start with more ranks
    PHASE.begin(5)
    with watch(cfg, 0, 1) as dog:
        PHASE.begin(12)
        PHASE.at("backward")
        dog._write_file()
        (path,) = (tmp_path / "heartbeats").glob("rank-*.json")
        written = json.loads(path.read_text())
        assert (written["rank"], written["step"], written["phase"], written["flag"]) == (0, 12, "backward", ALIVE)
        assert written["host"] == "n5"  # what sbatch --exclude takes
    assert json.loads(path.read_text())["flag"] == EXITED and len(list(path.parent.iterdir())) == 1
    other = {**written, "rank": 1, "host": "node7", "time": "2026-01-31T12:00:00+00:00"}
    (path.parent / "rank-00001.json").write_text(json.dumps(other))
    text = describe_heartbeats(tmp_path, time.time())
    assert text.startswith("2 rank(s), last heartbeat ") and text.endswith('rank 1 on node7, at "backward" of step 12')
    (path.parent / "rank-00001.json").write_text('{"time": "20')
    assert describe_heartbeats(tmp_path, time.time()).startswith("1 rank(s), ")
    assert describe_heartbeats(tmp_path / "nothing", 0.0) == ""


def test_a_slow_write_does_not_replace_the_last_heartbeat(tmp_path):
    cfg = config()
    cfg.run = str(tmp_path)
    computed = threading.Event()
    with watch(cfg, 0, 1) as dog:
        beat = dog._beat

        def slow_beat() -> Heartbeat:
            found = beat()
            if found.flag == ALIVE:
                computed.set()
                time.sleep(0.5)
            return found

        dog._beat = slow_beat
        writer = threading.Thread(target=dog._write_file)
        writer.start()
        assert computed.wait(10)
    writer.join()
    assert json.loads((tmp_path / "heartbeats/rank-00000.json").read_text())["flag"] == EXITED


def test_no_thread_where_nothing_is_watched(tmp_path):
    cfg = config(hang_timeout=0, lost_timeout=0)
    cfg.run = str(tmp_path)
    before = set(threading.enumerate())  # threads of earlier tests may end meanwhile
    with watch(cfg, 0, 1) as dog:
        assert isinstance(dog, Watchdog) and set(threading.enumerate()) <= before and not list(tmp_path.iterdir())


def test_a_disk_that_refuses_files_does_not_end_the_run(tmp_path):
    cfg = config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/heartbeats").write_text("")  # where a folder should be
    cfg.run = str(tmp_path / "run")
    with watch(cfg, 0, 1) as dog:
        dog._write_file()
        assert all(t.is_alive() for t in dog.threads)
