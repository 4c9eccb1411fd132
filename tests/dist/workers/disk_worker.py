"""Run in one process by test_disks.py, where DISK is a small disk of its own: what is written on a disk that fills, or
turns read-only. Each case leaves DISK empty."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from megastar.engine.checkpointer import async_saver as saver_module
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.tensorboard import TensorBoardWriter
from megastar.engine.phase import PHASE
from megastar.run_dir import checkpoint_dir, events, jsonl
from megastar.run_dir.jsonl import Lines
from megastar.run_dir.status import Status, health_of_disk
from tests.disks import fill, remount
from tests.dist.test_checkpoint import saver_for


def rows_of(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def row(n: int) -> str:
    return json.dumps({"n": n, "text": "x" * 300})


def lines_come_in_order_and_once(disk: Path) -> None:
    for sync_every in (0.0, 1e9):  # each line synced, and none before the disk fills
        jsonl.SYNC_EVERY = sync_every
        path = disk / "rows.jsonl"
        out = Lines(path)
        assert all(out.append(row(n)) for n in range(5))
        filler = fill(disk)
        taken = [out.append(row(n)) for n in range(5, 60)]  # some find room in the last page
        assert not taken[-1] and out.problem is not None and out.problem.strerror == "No space left on device"
        held = rows_of_whole(path)
        assert held == list(range(len(held))) and 60 - out.waiting <= len(held) < 40
        filler.unlink()
        assert out.append(row(60)) and not out.waiting and out.problem is None
        assert rows_of(path) == list(range(61))
        out.close()
        assert rows_of(path) == list(range(61))
        path.unlink()
    jsonl.SYNC_EVERY = 10.0


def rows_of_whole(path: Path) -> list[int]:
    """Without a line that is cut."""
    return [json.loads(line)["n"] for line in path.read_text().splitlines() if line.endswith("}")]


def a_read_only_disk(disk: Path) -> None:
    path, out = disk / "rows.jsonl", Lines(disk / "rows.jsonl")
    out.append(row(0))
    out.close()
    remount(disk, "ro")
    again = Lines(path)
    assert not again.append(row(1)) and not again.append(row(2)) and "Read-only" in again.problem.strerror
    events.append_event(disk, "warning", 1, "one")
    assert TensorBoardWriter(disk / "board", 0).problem.count("Read-only") == 1
    remount(disk, "rw")
    assert again.append(row(3)) and rows_of(path) == [0, 1, 2, 3]
    again.close()
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
    while not (metrics.disk_fails and metrics.board.writer is None):
        step += 1
        assert step < 250
        metrics.step(step, 4, {"loss": float(step)})
        if (writer := metrics.board.writer) is not None:
            for n in range(40):
                metrics.board.add({f"more/{n}": 1.0}, step)
            with suppress(OSError):  # the writer's thread would come to it after two minutes
                writer.flush()
    filler.unlink()
    for more in range(step + 1, step + 4):
        metrics.step(more, 4, {"loss": float(more)})
    metrics.close()
    found = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in found] == list(range(1, step + 4))
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
    assert "step-00000005 stays valid: free some space" in saver.problem
    ((text, more),) = saver.take_events()
    assert text.startswith(saver.problem) and "tried again within 60 s" in text and more == {"situation": "save"}
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
    assert "Read-only file system" in saver.save_with_retry(13, {}, 0) and "see that" in saver.problem
    remount(disk, "rw")
    # Little room is told at the start, and by megastar status.
    assert health_of_disk(Status("x", "running", ""), disk, {"files": {"a": {"bytes": 1 << 20}}}) == []
    (line,) = health_of_disk(Status("x", "running", ""), disk, {"files": {"a": {"bytes": 100 << 20}}})
    assert "the next checkpoint takes 100 MiB: free some space" in line
    saver.need = 100 << 20
    assert "need 300.0 MiB more" in saver.disk_shortfall(100) and "3 checkpoints of 100.0 MiB" in saver.disk_shortfall(100)
    saver.need = 1 << 20
    assert saver.disk_shortfall(100) == ""
    saver.cfg.train.keep_every = 1
    assert "103 checkpoints" in saver.disk_shortfall(100)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    lines_come_in_order_and_once(where)
    a_read_only_disk(where)
    a_run_without_a_disk_loses_no_row(where)
    a_save_is_tried_again(where)
