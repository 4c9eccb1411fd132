"""Claims: one holder, the dead are found out, the living left alone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megastar.utils.lockfile import Claims, file_server_time

HOLD = """
import sys, time
from pathlib import Path
from megastar.utils.lockfile import Claims, file_server_time
with Claims(Path(sys.argv[1])) as claims:
    assert claims.take("a")
    print("taken", flush=True)
    time.sleep(600)
"""


def test_one_of_many_threads_gets_a_claim(tmp_path):
    every = [Claims(tmp_path) for _ in range(8)]
    for round_ in range(20):
        won: list[int] = []
        go = threading.Barrier(8)

        def race(i: int, name: str = f"r{round_}", won=won, go=go) -> None:
            go.wait()
            if every[i].take(name):
                won.append(i)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(won) == 1


def test_release_and_end(tmp_path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a") and not second.take("a") and second.take("b")
        first.release("a")
        assert second.take("a")
        first.release("a")  # no longer its own
        assert not first.take("a")
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_is_seen_at_once(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "taken\n"
    claims = Claims(tmp_path)
    assert not claims.take("a")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and remains a zombie
    assert claims.take("a")
    child.wait()


def other_machine(folder: Path, age: float) -> Path:
    path = folder / "a.claim"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": os.getpid(), "start": "1", "token": "x"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_another_machines_claim_lasts_while_it_is_renewed(tmp_path):
    claims = Claims(tmp_path, limit=50)
    other_machine(tmp_path, age=30)
    assert not claims.take("a")
    other_machine(tmp_path, age=60)
    assert claims.take("a")


def test_a_stale_claim_is_taken_over_by_one(tmp_path, monkeypatch):
    """The others found the same claim stale, but what they move away is the new holder's."""
    first, second = Claims(tmp_path, limit=50), Claims(tmp_path, limit=50)
    path = other_machine(tmp_path, age=60)
    judged = second._is_stale

    def slow(claim: Path) -> bool:
        stale = judged(claim)
        if claim == path and stale:
            assert first.take("a")  # between the judgement and the rename
        return stale

    monkeypatch.setattr(second, "_is_stale", slow)
    assert not second.take("a")
    assert json.loads(path.read_text())["token"] == first.token and [p.name for p in tmp_path.iterdir()] == ["a.claim"]
    first.release("a")
    assert second.take("a")


def test_the_file_servers_clock_counts(tmp_path, monkeypatch):
    """A machine whose clock is a day off takes nothing over."""
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 86400)
    monkeypatch.setattr("megastar.utils.lockfile.machine", lambda: "here")
    claims = Claims(tmp_path)
    path = other_machine(tmp_path, age=0)
    os.utime(path)
    assert not claims.take("a") and abs(file_server_time(tmp_path) - path.stat().st_mtime) < 60


def test_claims_are_renewed(tmp_path):
    with Claims(tmp_path, renew_every=0.05) as claims:
        assert claims.take("a")
        os.utime(tmp_path / "a.claim", (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / "a.claim").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_claim_that_was_never_filled(tmp_path, content):
    claims = Claims(tmp_path, renew_every=5)
    (tmp_path / "a.claim").write_text(content)
    assert not claims.take("a")  # it may still be
    os.utime(tmp_path / "a.claim", (time.time() - 10,) * 2)
    assert claims.take("a")


def test_without_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        Claims(tmp_path / "gone").take("a")
