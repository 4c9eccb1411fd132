"""Shards are compared with their SHA-256 before they are read, once for the processes of a node that run together."""

import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megastar.data.loader import validation_batches
from megastar.data.shards.reader import ShardSet
from megastar.data.storage import verification
from megastar.data.storage.errors import Stopped
from megastar.data.storage.verification import BeingVerified, Verifier
from megastar.errors import UserError
from tests.unit.data.shards.test_shards import layouts, sample, write_set
from tests.unit.data.test_loader import loader, take

ROOT = Path(__file__).parents[4]


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """One entry for each file that this process hashes."""
    found: list[int] = []
    real = verification._sha256

    def count(fd: int, stop: threading.Event) -> str:
        found.append(fd)
        return real(fd, stop)

    monkeypatch.setattr(verification, "_sha256", count)
    return found


def flip(path: Path, at: int = -1) -> None:
    """Change codes of a tar, and no size and no time."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    at = data.index(b"\x93NUMPY") + 128 if at < 0 else at
    data[at] ^= 1
    with path.open("r+b") as f:
        f.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@layouts
def test_a_damaged_shard_is_named_and_no_sample_of_it_is_read(tmp_path, layout):
    folder = write_set(tmp_path / "s", layout=layout)
    ShardSet(folder).read(0, 0)  # indexes are there, and the times stay
    flip(folder / "shard-00002.tar")
    shards = ShardSet(folder)
    assert np.array_equal(shards.read(0, 1)[0], sample(1)[0])
    sentence = (
        r"token shard .*shard-00002.tar has SHA-256 [0-9a-f]{64}, the manifest records [0-9a-f]{64}: it is damaged"
    )
    for read in (
        lambda: shards.read(2, 0),
        lambda: shards.gather([0, 5], np.zeros((2, 1), np.int64)),
        lambda: validation_batches(shards, 9, 4),
        lambda: take(loader(folder, global_batch=9), 1),
    ):
        with pytest.raises(UserError, match=sentence):
            read()


def test_batches_before_a_damaged_shard_are_handed_out(tmp_path):
    folder = write_set(tmp_path / "s", sizes=(4, 4, 4))
    source = loader(folder, window=1, global_batch=4)
    damaged = [int(b["ids"][0]) // 4 for b in take(source, 3)][1]  # the shard of the second batch
    flip(folder / f"shard-{damaged:05d}.tar")
    batches = iter(loader(folder, window=1, global_batch=4))
    next(batches)
    with pytest.raises(UserError, match=f"shard-{damaged:05d}.tar has SHA-256"):
        next(batches)


def test_a_file_is_hashed_once_while_a_process_that_compared_it_runs(tmp_path, hashed):
    folder = write_set(tmp_path / "s", sizes=(4,))
    first = ShardSet(folder, max_open=1)
    first.read(0, 0)
    second = ShardSet(folder)
    second.read(0, 0)
    first.close()
    first.read(0, 1)
    assert len(hashed) == 1
    script = (
        "import sys; from megastar.data.shards.reader import ShardSet; from megastar.data.storage import verification\n"
    )
    script += "verification._sha256 = lambda *_: print('hashed') or sys.exit(1)\nShardSet(sys.argv[1]).read(0, 0)"
    words = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    del first, second  # as the end of their processes
    gc.collect()
    ShardSet(folder).read(0, 0)
    assert len(hashed) == 2


def test_a_file_that_is_written_to_while_it_is_open_is_hashed_again(tmp_path, hashed):
    folder = write_set(tmp_path / "s", sizes=(4,))
    shards = ShardSet(folder)
    shards.read(0, 0)
    flip(folder / "shard-00000.tar")
    with pytest.raises(UserError, match="has SHA-256"):
        shards.read(0, 0)
    assert len(hashed) == 2


def test_the_time_of_use_of_a_cached_file_is_no_change(tmp_path):
    path = write_set(tmp_path / "s", sizes=(4,)) / "shard-00000.tar"
    verifier = Verifier(ctime=False)
    with path.open("rb") as f:
        before = verifier.version(f)
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
        assert verifier.version(f) == before


def test_the_shards_that_come_next_are_verified_in_the_background(tmp_path, hashed):
    folder = write_set(tmp_path / "s", sizes=(4, 4, 4, 4))
    source = loader(folder, window=2, global_batch=4)
    batches = iter(source)
    next(batches)
    for _ in range(200):
        if len(hashed) == 4:
            break
        threading.Event().wait(0.05)
    assert len(hashed) == 4
    batches.close()
    source.close()


def test_a_file_that_another_process_hashes_is_waited_for(tmp_path):
    folder = write_set(tmp_path / "s", sizes=(4,))
    shards = ShardSet(folder)
    info, stop = shards.manifest.shards[0], threading.Event()
    with (folder / info.name).open("rb") as f:
        busy, other = Verifier(ctime=True), Verifier(ctime=True)
        key = busy._key(f, info)
        assert busy._claim(key, True) == verification._MINE
        with pytest.raises(BeingVerified):
            other.digest(f, info, stop, wait=False)
        stop.set()
        with pytest.raises(Stopped):
            other.digest(f, info, stop)
        busy._settle(key, False)  # it was damaged: the other finds that out by itself
        wrong = replace(info, sha256="0" * 64)
        assert other.digest(f, wrong, threading.Event()) == info.sha256
        assert other.digest(f, info, threading.Event(), wait=False) == info.sha256


def test_a_suspended_process_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s", sizes=(4,))
    info = ShardSet(folder).manifest.shards[0]
    monkeypatch.setattr(verification, "_PATIENCE", 0.1)
    with (folder / info.name).open("rb") as f:
        busy = Verifier(ctime=True)
        busy._claim(busy._key(f, info), True)
        assert Verifier(ctime=True).digest(f, info, threading.Event()) == info.sha256


def test_without_a_lock_file_each_store_hashes(tmp_path, monkeypatch, hashed):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verification, "open_own", refuse)
    folder = write_set(tmp_path / "s", sizes=(4,))
    one, other = ShardSet(folder), ShardSet(folder)
    one.read(0, 0)
    other.read(0, 0)
    assert len(hashed) == 2


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s", sizes=(4,))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verification, "_sha256", fail)
    with pytest.raises(UserError, match=r"shard-00000.tar cannot be read \(Input/output error\): check the disk"):
        ShardSet(folder).read(0, 0)
