"""Run in one process by test_disks.py, where DISK is a small disk of its own: what is written on a disk that fills, or
turns read-only. Each case leaves DISK empty."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.engine.checkpointer import async_saver as saver_module
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.tensorboard import TensorBoardWriter
from megastar.engine.phase import PHASE
from megastar.run_dir import checkpoint_dir, events, jsonl
from megastar.run_dir.jsonl import JsonlWriter, read_jsonl
from megastar.run_dir.status import Status, health_of_disk
from tests.disks import fill, remount
from tests.dist.test_checkpoint import saver_for


def numbers(path: Path) -> list[int]:
    return [r["n"] for r in read_jsonl(path)]


def row(n: int) -> dict[str, Any]:
    return {"n": n, "step": n, "text": "x" * 300}


def rows_wait_for_a_full_disk(disk: Path) -> None:
    """Each row is there once and in order, whatever part of it the full disk took."""
    out = JsonlWriter(disk / "rows.jsonl")
    assert all(out.append(row(n)) for n in range(5))
    filler = fill(disk)
    written = [out.append(row(n)) for n in range(5, 60)]  # some find room in the last page
    assert not written[-1] and out.error is not None and out.error.strerror == "No space left on device"
    found = numbers(out.path)
    assert found == list(range(60 - len(out.pending))) and len(found) < 40
    filler.unlink()
    assert out.append(row(60)) and not out.pending and out.error is None
    assert numbers(out.path) == list(range(61))
    out.path.unlink()


def a_full_disk_needs_no_room_for_a_cut(disk: Path) -> None:
    out = JsonlWriter(disk / "rows.jsonl")
    for n in range(40):
        out.append(row(n))
    filler = fill(disk)
    while out.append(row(len(numbers(out.path)))):
        pass
    out.cut_after(20)
    assert numbers(out.path) == list(range(21)) and not out.pending
    filler.unlink()
    out.path.unlink()


def pending_rows_are_bounded(disk: Path) -> None:
    jsonl.MAX_PENDING, most = 10, jsonl.MAX_PENDING
    out = JsonlWriter(disk / "none" / "rows.jsonl")
    for n in range(25):
        assert not out.append(row(n))
    assert (len(out.pending), out.take_dropped()) == (10, 15)
    (disk / "none").mkdir()
    assert out.flush() and numbers(out.path) == list(range(15, 25))
    shutil.rmtree(disk / "none")
    jsonl.MAX_PENDING = most


def a_read_only_disk(disk: Path) -> None:
    path, out = disk / "rows.jsonl", JsonlWriter(disk / "rows.jsonl")
    out.append(row(0))
    remount(disk, "ro")
    assert not out.append(row(1)) and not out.append(row(2))
    assert out.error is not None and out.error.strerror == "Read-only file system"
    events.append_event(disk, "warning", 1, "one")
    assert TensorBoardWriter(disk / "board", 0).take_problem().count("Read-only") == 1
    remount(disk, "rw")
    assert out.append(row(3)) and numbers(path) == [0, 1, 2, 3]
    events.append_event(disk, "warning", 2, "two")
    assert [e["text"] for e in events.read_events(disk)] == ["one", "two"]
    for file in (path, disk / events.NAME):
        file.unlink()


def a_run_without_a_disk_loses_no_row(disk: Path) -> None:
    """Metrics and events together, TensorBoard dropped."""
    metrics = MetricsLogger(disk, 0, 300, 1, True)
    metrics.step(1, 4, {"loss": 1.0})
    filler = fill(disk)
    step = 1
    while not (metrics.disk_fails and metrics.trackers.board.writer is None):
        step += 1
        assert step < 250
        metrics.step(step, 4, {"loss": float(step)})
        if (writer := metrics.trackers.board.writer) is not None:
            for n in range(40):
                metrics.trackers.board.add({f"more/{n}": 1.0}, step)
            with suppress(OSError):  # the writer's thread would come to it after two minutes
                writer.flush()
    filler.unlink()
    for more in range(step + 1, step + 4):
        metrics.step(more, 4, {"loss": float(more)})
    metrics.close()
    assert [r["step"] for r in read_jsonl(disk / "metrics.jsonl")] == list(range(1, step + 4))
    told = [e for e in events.read_events(disk) if e["event"] == "warning"]
    disks = [e for e in told if e.get("situation") == "disk"]
    assert [bool(e.get("over")) for e in disks] == [False, True] and "No space left on device" in disks[0]["text"]
    assert sum("TensorBoard" in e["text"] for e in told) == 1
    assert events.open_situations(told) == []
    for file in disk.glob("*.jsonl"):
        file.unlink()


def a_save_is_tried_again(disk: Path) -> None:
    saver = saver_for(disk)
    saver.save(5, {})
    saver.finish()
    assert saver.take_events() == [] and not saver.problem
    # Not enough from the start.
    filler = fill(disk)
    saver.save(6, {})
    assert saver.thread is None and "it needs 1.0 MiB, 0.0 MiB are free" in saver.problem, saver.problem
    assert "step-00000005 stays valid: free some disk space" in saver.problem
    ((text, more),) = saver.take_events()
    assert text.startswith(saver.problem) and "retried within 60 s" in text and more == {"situation": "save"}
    # Enough as it seems, and full in the middle of the files.
    saver.need = 0
    saver.save(7, {})
    if saver.thread is not None:
        saver.thread.join()
        assert saver.failed
        assert not saver.retry_due()  # it waits for its time
    assert "No space left on device" in saver.problem and saver.take_events() == [] and not saver.failed
    assert sorted(p.name for p in saver.folder.iterdir()) == ["latest", "step-00000005"]
    checkpoint_dir.verify(saver.folder / "step-00000005")
    saver_module.RETRY_EVERY = 0.05
    saver.save(8, {})
    saver.finish()
    assert not saver.done or saver.done.name == "step-00000005"
    time.sleep(0.1)
    assert saver.failed and saver.retry_due()
    filler.unlink()
    saver.save(9, {})
    assert saver.finish().name == "step-00000009" and not saver.problem and not saver.failed
    ((text, more),) = saver.take_events()
    assert "is written, after" in text and more == {"situation": "save", "over": True}
    # The end of a run: in time, and not in time.
    filler = fill(disk)
    began, moves = time.monotonic(), PHASE.moves
    problem = saver.save_with_retry(10, {}, 1.5)
    assert 1.4 < time.monotonic() - began < 10 and "checkpoint of step 10" in problem and "step-00000009" in problem
    assert PHASE.moves > moves + 1  # or the watchdog would take a long patience for a hang
    assert saver.save_with_retry(11, {}, 600, stop=lambda: True)
    filler.unlink()
    assert saver.save_with_retry(12, {}, 0) == "" and checkpoint_dir.latest(saver.folder).name == "step-00000012"
    checkpoint_dir.verify(saver.folder / "step-00000012")
    remount(disk, "ro")
    assert "Read-only file system" in saver.save_with_retry(13, {}, 0) and "writable on every node" in saver.problem
    remount(disk, "rw")
    # Little room is told at the start, and by megastar status.
    assert health_of_disk(Status("x", "running", ""), disk, {"files": {"a": {"bytes": 1 << 20}}}) == []
    (line,) = health_of_disk(Status("x", "running", ""), disk, {"files": {"a": {"bytes": 100 << 20}}})
    assert "the next checkpoint takes 100 MiB: free some space" in line
    saver.need = 100 << 20
    assert "need 300.0 MiB more" in saver.disk_shortfall(100) and "3 checkpoints of 100.0 MiB" in saver.disk_shortfall(
        100
    )
    saver.need = 1 << 20
    assert saver.disk_shortfall(100) == ""
    saver.cfg.train.keep_every = 1
    assert "103 checkpoints" in saver.disk_shortfall(100)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    rows_wait_for_a_full_disk(where)
    a_full_disk_needs_no_room_for_a_cut(where)
    pending_rows_are_bounded(where)
    a_read_only_disk(where)
    a_run_without_a_disk_loses_no_row(where)
    a_save_is_tried_again(where)
