"""JSON Lines files of a run folder on a disk that reports late that it is full."""

from __future__ import annotations

import errno
import os

import pytest

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
