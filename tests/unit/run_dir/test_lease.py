"""The lease of a run folder: one holder, named to a second one; holders that are gone are succeeded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megastar.errors import UserError
from megastar.run_dir import events
from megastar.run_dir.layout import LEASE, LOCK
from megastar.run_dir.lease import Holder, LeaseLost, RunLease, hold, read_holder
from megastar.utils.lockfile import machine

HOLD = """
import sys, time
from pathlib import Path
from megastar.run_dir.lease import RunLease
assert RunLease(Path(sys.argv[1]), "megastar train", "run").acquire()
print("held", flush=True)
time.sleep(600)
"""


def lease(folder: Path, limit: float = 1.0, renew_every: float = 0.1) -> RunLease:
    return RunLease(folder, "megastar train", "run", renew_every=renew_every, limit=limit)


@pytest.fixture
def other(tmp_path):
    """A process that holds ``tmp_path``."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def on_another_host(run: Path, **fields: object) -> Path:
    """A record of a holder that this machine cannot see."""
    lock = run / LOCK
    lock.touch()
    holder = Holder(
        "megastar train", "n7", "n7 boot-of-n7 pid:[1]", 4711, "99", "2026-01-31T12:00:00+00:00", "417", "0", "3", "",
        "token", lock.stat().st_ino,
    )  # fmt: skip
    (run / LEASE).write_text(json.dumps(asdict(replace(holder, **fields))))
    return run / LEASE


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_process_is_refused_by_name(tmp_path, other):
    with pytest.raises(UserError) as error:
        lease(tmp_path).acquire()
    assert f"process {other.pid} on " in str(error.value) and "since 2" in str(error.value)
    assert f"(kill {other.pid} on " in str(error.value) and "another run=..." in str(error.value)
    assert "last heartbeat" in str(error.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_is_succeeded_at_once(tmp_path, other, how):
    other.send_signal(how)
    other.wait()
    start, mine = time.monotonic(), lease(tmp_path, limit=60)
    assert mine.acquire() and time.monotonic() - start < 5
    assert f"process {other.pid} " in mine.taken_over and "has ended" in mine.taken_over
    mine.release()
    assert read_holder(tmp_path) is None
    second = lease(tmp_path)
    assert second.acquire() and not second.taken_over  # the first one has said that it ended
    second.release()


def test_a_stopped_process_still_holds_the_folder(tmp_path, other):
    other.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / LEASE, (1, 1))  # no heartbeat for years
    with pytest.raises(UserError, match="in use by megastar train"):
        lease(tmp_path).acquire()


def test_a_silent_holder_on_another_host_is_succeeded_after_the_limit(tmp_path):
    start = time.monotonic()
    on_another_host(tmp_path)
    mine = lease(tmp_path, limit=0.5)
    assert mine.acquire() and 0.4 < time.monotonic() - start < 10
    assert "process 4711 on n7, job 417" in mine.taken_over and "no heartbeat" in mine.taken_over
    mine.release()


def test_a_holder_on_another_host_that_renews_its_record_is_left_alone(tmp_path, monkeypatch):
    path = on_another_host(tmp_path)
    monkeypatch.setattr("megastar.run_dir.lease.time.sleep", lambda _: os.utime(path))
    with pytest.raises(UserError, match=r"process 4711 on n7, job 417, since .*scancel 417"):
        lease(tmp_path, limit=60).acquire()


REQUEUED = {"SLURM_JOB_ID": "417", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "0"}
SAME_STEP = {"SLURM_JOB_ID": "417", "SLURM_STEP_ID": "3"}  # the launcher restarted the ranks within the step
SAME_LAUNCH = {"TORCHELASTIC_RUN_ID": "night-run"}


def set_all(monkeypatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def renew(monkeypatch, path: Path, times: float = float("inf")) -> list[float]:
    """The holder of ``path`` on another machine is alive: it renews its record whenever the waiting process sleeps, at most
    ``times`` times. Returns the list of the times of renewal, which grows."""
    renewed, sleep = [], time.sleep

    def pause(seconds: float) -> None:
        sleep(seconds)
        if len(renewed) < times:
            os.utime(path)
            renewed.append(time.monotonic())

    monkeypatch.setattr("megastar.run_dir.lease.time.sleep", pause)
    return renewed


@pytest.mark.parametrize("environment", [REQUEUED, SAME_STEP, SAME_LAUNCH])
def test_a_later_start_of_the_same_job_does_not_wait_for_the_limit(tmp_path, monkeypatch, environment):
    on_another_host(tmp_path, launch="night-run")
    set_all(monkeypatch, environment)
    mine, start = lease(tmp_path, limit=60), time.monotonic()
    assert mine.acquire() and time.monotonic() - start < 10
    assert "process 4711 on n7, job 417" in mine.taken_over
    assert ("an earlier start of this job" in mine.taken_over) == (environment is REQUEUED)  # SLURM has ended it
    mine.release()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "417", "SLURM_STEP_ID": "4"},  # two steps of one allocation
        {"SLURM_JOB_ID": "418", "SLURM_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RUN_ID": "none"},
        {"TORCHELASTIC_RUN_ID": "day-run"},
    ],
)
def test_another_job_waits_for_the_limit(tmp_path, monkeypatch, environment):
    on_another_host(tmp_path, launch="night-run")
    set_all(monkeypatch, environment)
    until = time.monotonic() + 1.5  # a start of the same launch would have taken it over after 0.3 s
    assert not lease(tmp_path, limit=60).acquire(lambda: time.monotonic() > until)
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "token"


@pytest.mark.parametrize("environment", [SAME_STEP, SAME_LAUNCH])
def test_a_renewed_lease_of_the_same_launch_is_not_taken_over(tmp_path, monkeypatch, environment):
    path = on_another_host(tmp_path, launch="night-run")
    set_all(monkeypatch, environment)
    renew(monkeypatch, path)
    with pytest.raises(UserError, match="in use by megastar train .process 4711 on n7, job 417"):
        lease(tmp_path, limit=2, renew_every=0.5).acquire()
    assert json.loads(path.read_text())["token"] == "token"


def test_a_holder_of_the_same_launch_that_ends_during_the_wait_is_succeeded(tmp_path, monkeypatch):
    """It was on a node that the agents had lost, and its own watchdog ends it a little later."""
    path = on_another_host(tmp_path, launch="night-run")
    set_all(monkeypatch, SAME_LAUNCH)
    renewed = renew(monkeypatch, path, times=10)
    mine = lease(tmp_path, limit=60, renew_every=0.5)
    assert mine.acquire() and 1.4 < time.monotonic() - renewed[-1] < 20 and "no heartbeat" in mine.taken_over
    assert len(renewed) == 10
    mine.release()


def test_the_earlier_start_of_a_requeued_job_is_no_successor(tmp_path, monkeypatch):
    path = on_another_host(tmp_path, restart="1")
    set_all(monkeypatch, SAME_STEP | {"SLURM_RESTART_COUNT": "0"})
    until = time.monotonic() + 1.0
    assert not lease(tmp_path, limit=60).acquire(lambda: time.monotonic() > until)
    assert json.loads(path.read_text())["restart"] == "1"


def test_a_record_of_the_future_expires(tmp_path):
    path = on_another_host(tmp_path)
    os.utime(path, (time.time() + 1e6,) * 2)
    mine = lease(tmp_path, limit=0.5)
    assert mine.acquire() and "no heartbeat" in mine.taken_over
    mine.release()


def test_removing_the_lock_file_does_not_release_the_folder(tmp_path, other):
    (tmp_path / LOCK).unlink()
    for _ in range(2):  # the first attempt has made a new lock file
        with pytest.raises(UserError, match=f"in use by megastar train .process {other.pid} on"):
            lease(tmp_path).acquire()
    assert read_holder(tmp_path)[0].pid == other.pid


def test_removing_the_lock_file_does_not_release_the_folder_of_a_container(tmp_path, monkeypatch):
    """Its processes cannot be seen from here."""
    boot = machine().split(" ")[1]
    path = on_another_host(
        tmp_path, machine=f"n7 {boot} pid:[1]", folder=f"{tmp_path.stat().st_dev}:{tmp_path.stat().st_ino}"
    )
    (tmp_path / LOCK).rename(tmp_path / "removed")  # keeps its inode: the new file has another one
    renew(monkeypatch, path)
    with pytest.raises(UserError, match="in use by megastar train .process 4711 on n7"):
        lease(tmp_path, limit=60).acquire()


def test_a_folder_with_two_mounts_is_held_in_both(tmp_path, other, monkeypatch):
    """Its device, and with some file systems its inode, differ: the record is renewed all the same."""
    record = json.loads((tmp_path / LEASE).read_text())
    (tmp_path / LEASE).write_text(json.dumps(record | {"folder": "1:1"}))
    (tmp_path / LOCK).unlink()
    renew(monkeypatch, tmp_path / LEASE)
    with pytest.raises(UserError, match=f"in use by megastar train .process {other.pid} on"):
        lease(tmp_path, renew_every=1).acquire()


def test_a_lock_file_that_is_replaced_during_the_wait_is_locked_anew(tmp_path, monkeypatch):
    path, mine = on_another_host(tmp_path), lease(tmp_path, limit=60)
    first = (tmp_path / LOCK).stat().st_ino
    (tmp_path / LOCK).rename(tmp_path / "kept")
    calls = iter([False, True])

    def remove() -> bool:
        if not next(calls, True):
            (tmp_path / LOCK).unlink()
            (tmp_path / LOCK).touch()
            os.utime(path, (1, 1))
        return False

    assert mine.acquire(remove)
    assert os.fstat(mine._fd).st_ino == (tmp_path / LOCK).stat().st_ino != first
    mine.release()


def test_a_record_of_an_older_release_is_read(tmp_path, other):
    record = json.loads((tmp_path / LEASE).read_text())
    del record["folder"]
    (tmp_path / LEASE).write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"process {other.pid} on"):
        lease(tmp_path).acquire()


@pytest.mark.parametrize("old", [False, True])
def test_a_copied_folder_is_not_held(tmp_path, other, old):
    copy = tmp_path / "copy"
    copy.mkdir()
    record = json.loads((tmp_path / LEASE).read_text())
    if old:
        del record["folder"]
    (copy / LEASE).write_text(json.dumps(record))
    mine = lease(copy)
    assert mine.acquire() and not mine.taken_over and read_holder(copy)[0].pid == os.getpid()
    mine.release()


def test_a_damaged_record_does_not_lock_a_folder_for_ever(tmp_path):
    for content in ("", "{", "[1]", '{"pid": 1}', '{"pid": ' + "[" * 5000):
        (tmp_path / LEASE).write_text(content)
        assert read_holder(tmp_path) is None
        with hold(tmp_path, "megastar train", "run"):
            assert read_holder(tmp_path)[0].pid == os.getpid()


def test_a_holder_whose_lease_is_taken_writes_nothing_more(tmp_path):
    mine = lease(tmp_path)
    mine.acquire()
    mine.check()
    events.append_event(tmp_path, "warning", 1, "mine")
    path = on_another_host(tmp_path)
    with pytest.raises(LeaseLost, match="taken over by megastar train .process 4711 on n7.* writes nothing more"):
        mine.check()
    before = (tmp_path / events.NAME).read_bytes()
    events.append_event(tmp_path, "error", 1, "not mine")
    assert (tmp_path / events.NAME).read_bytes() == before
    mine.release()
    assert path.exists()  # it is the other's
    path.unlink()
    with hold(tmp_path, "megastar train", "run"):
        events.append_event(tmp_path, "warning", 1, "mine again")
    assert "mine again" in (tmp_path / events.NAME).read_text()


def test_the_thread_renews_the_record_and_notices_a_successor(tmp_path):
    mine = lease(tmp_path)
    mine.acquire()
    os.utime(tmp_path / LEASE, (1, 1))
    deadline = time.monotonic() + 10
    while (tmp_path / LEASE).stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.time() - (tmp_path / LEASE).stat().st_mtime < 60
    (tmp_path / LEASE).unlink()  # by a person: written again
    while not (tmp_path / LEASE).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_holder(tmp_path)[0].token == mine.holder.token
    on_another_host(tmp_path)
    while not mine.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "4711 on n7" in mine.lost
    mine.release()


def test_a_folder_that_cannot_be_made_or_written_gets_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder, problem in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file/run", "file is not a folder"),
        (tmp_path / "link", "is a symbolic link to .*gone, which does not exist"),
        (tmp_path / "link/run", "is a symbolic link to .*gone, which does not exist"),
        (Path("/proc/no-run"), "cannot be created"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=problem):
            lease(folder).acquire()


def test_a_file_system_without_locks_is_guarded_by_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLease, "_lock", lambda self: None)
    first = lease(tmp_path)
    assert first.acquire()
    with pytest.raises(UserError, match="in use by"):
        lease(tmp_path).acquire()
    first.release()
    third = lease(tmp_path)
    assert third.acquire()
    third.release()


def test_a_full_disk_needs_no_record(tmp_path, monkeypatch):
    def full(self: RunLease) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLease, "_write_record", full)
    mine = lease(tmp_path)
    assert mine.acquire()
    mine.check()
    mine.release()
