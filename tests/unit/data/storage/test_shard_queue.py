"""Threads that prepare shards ahead."""

import threading
import time

from megastar.data.storage.shard_info import ShardInfo
from megastar.data.storage.shard_queue import ShardQueue


def shard(number):
    return ShardInfo(name=f"shard-{number:05d}.tar", samples=1, bytes=1, sha256="0" * 64)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_threads_without_work_end_and_come_back(monkeypatch):
    monkeypatch.setattr("megastar.data.storage.shard_queue._IDLE", 0.2)
    done: list[str] = []
    before = set(threading.enumerate())  # of earlier tests

    def prepare(info, closed):
        done.append(info.name)
        return True

    queue = ShardQueue(prepare, 3, first_alone=False)
    queue.replace([])
    assert not queue._threads
    for number in (1, 2):
        queue.replace([shard(number)])
        wait_for(lambda number=number: len(done) == number)
        wait_for(lambda: not queue._threads)
    queue.replace([shard(3)])
    queue.close()
    assert not queue._threads and not any(t.name == "shard-read-ahead" for t in set(threading.enumerate()) - before)


def test_a_shard_that_another_process_prepares_is_tried_again_after_a_close():
    answers, seen = iter([False, False, True, True]), []

    def prepare(info, closed):
        seen.append(info.name)
        return next(answers)

    queue = ShardQueue(prepare, 1, first_alone=False)
    queue.replace([shard(1)])
    wait_for(lambda: len(seen) == 3)
    queue.close()
    queue.replace([shard(2)])
    wait_for(lambda: seen[-1] == shard(2).name)
    queue.close()
    assert seen == [shard(1).name] * 3 + [shard(2).name]
