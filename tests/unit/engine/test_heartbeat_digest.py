"""The heartbeats that a rank reads in a large job, on a store in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megastar.config.schema import RunConfig
from megastar.engine.fault_tolerance.failure_detector import FailureDetector
from megastar.engine.fault_tolerance.heartbeat import ABORTED, EXITED, Heartbeat
from megastar.engine.fault_tolerance.heartbeat_digest import ABOVE, MOST, pack, read_peers, unpack

WORLD = ABOVE + 1


class Job:
    """A store with the heartbeat of each rank, and a detector for each of some ranks."""

    def __init__(self, world: int, *ranks: int):
        self.world, self.values, self.keys_read = world, dict[str, bytes](), 0
        self.beats = {r: Heartbeat(r, "node", 100 + r, phase="asking all ranks") for r in range(world)}
        self.detectors = {r: FailureDetector(RunConfig(), r, 1.0, "node0") for r in ranks}
        self.now = 0.0

    def of(self, rank: int) -> Any:
        def read(ranks: list[int]) -> dict[int, bytes]:
            self.keys_read += len(ranks)
            return {r: self.values[str(r)] for r in ranks}

        get = lambda key: self.values.get(key, b"")  # noqa: E731
        return SimpleNamespace(rank=rank, world=self.world, read=read, write=self.values.__setitem__, get=get)

    def seconds(self, count: int, silent: tuple[int, ...] = ()) -> None:
        for _ in range(count):
            self.now += 1.0
            for rank, beat in self.beats.items():
                beat.beat += rank not in silent
                self.values[str(rank)] = beat.encode()
            for rank, detector in self.detectors.items():
                detector.advance(self.now)
                detector.receive(read_peers(self.of(rank), detector, True))


def test_up_to_128_ranks_read_every_heartbeat():
    job = Job(ABOVE, 0, 5)
    job.seconds(1)
    assert job.keys_read == 2 * (ABOVE - 1) and "digest" not in job.values
    assert set(job.detectors[5].beats) == set(range(ABOVE)) - {5}


def test_in_a_larger_job_a_rank_reads_rank_0_and_what_it_found():
    job = Job(WORLD, 0, 5)
    job.seconds(3)
    assert job.keys_read == 3 * (WORLD - 1 + 1) and set(job.detectors[5].beats) == {0}
    job.beats[7].flag, job.beats[7].status, job.beats[7].text = EXITED, 1, "its error"
    job.beats[8].flag = EXITED  # without an error
    job.seconds(2)
    assert set(job.detectors[5].beats) == {0, 7}
    diagnosis = job.detectors[5].failed_peer(0)
    assert diagnosis and diagnosis.text == "rank 7 on node (pid 107) exited with an error: its error"
    job.beats[9].flag, job.beats[9].status, job.beats[9].text = ABORTED, 75, "why"
    job.seconds(2)
    aborted = job.detectors[5].aborted_peer()
    assert aborted and (aborted.text, aborted.status) == ("why", 75)
    assert [unpack(job.values["digest"])[r] for r in (7, 9)] == [job.beats[r].encode() for r in (7, 9)]


def test_a_silent_rank_is_found_through_the_digest_and_one_that_returns_is_not():
    job = Job(WORLD, 0, 5)
    job.seconds(3)
    job.seconds(4, silent=(11,))
    assert set(job.detectors[5].beats) == {0, 11} and not job.detectors[5].silent_ranks(5.0)
    job.seconds(6, silent=(11,))
    assert [b.rank for b in job.detectors[5].silent_ranks(5.0)] == [11]
    assert [b.rank for b in job.detectors[0].silent_ranks(5.0)] == [11]
    job.seconds(2)
    assert 11 not in unpack(job.values["digest"]) and not job.detectors[5].silent_ranks(5.0)
    job.seconds(20)
    assert set(job.detectors[5].beats) == {0, 11} and not job.detectors[5].silent_ranks(2.0)


def test_a_digest_is_bounded_and_starts_with_what_ends_a_run():
    job = Job(4 * ABOVE, 0, 5)
    job.seconds(2)
    job.beats[400].flag = ABORTED
    job.seconds(5, silent=tuple(range(100, 300)))
    found = unpack(job.values["digest"])
    assert len(found) == MOST and 400 in found
    assert unpack(pack({3: b".\xff{}"})) == {3: b".\xff{}"} and unpack(b"") == {}
