"""JSON Lines files of a run folder on a disk that reports late that it is full."""

from __future__ import annotations

import errno
import os
import tracemalloc

import pytest

from megastar.errors import UserError
from megastar.run_dir import jsonl


def steps(path):
    return [row["step"] for row in jsonl.read_jsonl(path)]


@pytest.fixture
def late_errors(monkeypatch):
    """While the returned list is not empty, a sync drops what was written after that many bytes, as NFS may."""
    size: list[int] = []

    def fsync(fd, sync=os.fsync):
        if not size:
            return sync(fd)
        os.ftruncate(fd, size[0])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return size


def test_rows_that_a_sync_loses_are_written_again(tmp_path, late_errors):
    rows = jsonl.JsonlWriter(tmp_path / "metrics.jsonl")
    rows.append({"step": 1})
    assert rows.flush(sync=True)
    late_errors.append(rows.path.stat().st_size)
    assert rows.append({"step": 2}) and rows.append({"step": 3})
    assert not rows.flush(sync=True) and not rows.append({"step": 4}) and len(rows.pending) == 3
    assert rows.error is not None and rows.error.errno == errno.ENOSPC
    late_errors.clear()
    assert rows.append({"step": 5}) and steps(rows.path) == [1, 2, 3, 4, 5] and not rows.pending


def test_a_cut_after_a_failed_sync_leaves_each_row_once(tmp_path, late_errors):
    rows = jsonl.JsonlWriter(tmp_path / "metrics.jsonl")
    rows.append({"step": 1})
    rows.flush(sync=True)
    late_errors.append(rows.path.stat().st_size)
    for step in (2, 3, 4):
        rows.append({"step": step})
    rows.cut_after(2)
    late_errors.clear()
    assert rows.append({"step": 3}) and steps(rows.path) == [1, 2, 3]


def test_dropped_rows_are_counted_once(tmp_path, late_errors, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_PENDING", 2)
    rows = jsonl.JsonlWriter(tmp_path / "absent" / "metrics.jsonl")
    for step in range(5):
        assert not rows.append({"step": step})
    assert rows.take_dropped() == 3 and rows.take_dropped() == 0
    assert not rows.append({"step": 5}) and rows.take_dropped() == 1


@pytest.mark.parametrize(
    "damage, kept",
    [
        (b"", [1, 2]),
        (b"\xff" * 3_000_000 + b"\n", [1, 2]),
        (b'{"step": 2, "loss": 1', [1, 2]),
        (b'{"step": 2}', [1, 2, 2]),
        (b'{"step": 9}\n{"step": 2, "b": 1}\n', [1, 2, 2]),
        (b"[]\n" * 1000 + b'{"step": 1e400}\n{"step": true}\n', [1, 2]),
    ],
)
def test_a_cut_removes_later_and_damaged_lines(tmp_path, damage, kept):
    rows = jsonl.JsonlWriter(tmp_path / "metrics.jsonl")
    rows.path.write_bytes(b'{"step": 1}\n{"step": 2, "a": 1}\n' + damage)
    rows.cut_after(2)
    assert steps(rows.path) == kept and rows.append({"step": 3}) and steps(rows.path) == [*kept, 3]
    assert all(line.startswith(b'{"step"') for line in rows.path.read_bytes().splitlines())


def test_a_cut_of_a_large_file_takes_little_memory_and_an_endless_one_is_refused(tmp_path):
    rows = jsonl.JsonlWriter(tmp_path / "metrics.jsonl")
    line = b'{"step": 1, "text": "%s"}\n' % (b"x" * 1000)
    rows.path.write_bytes(line * 60_000 + b'{"step": 7}\n' + line)
    tracemalloc.start()
    rows.cut_after(2)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert rows.path.stat().st_size == len(line) * 60_001
    os.truncate(rows.path, 64 << 30)
    with pytest.raises(UserError, match=r"metrics.jsonl has 68719476736 bytes, at most"):
        jsonl.JsonlWriter(rows.path).cut_after(2)
