"""When the failure detector reports, which ranks it names, and what the watchdog writes. Real processes: tests/dist."""

from __future__ import annotations

import json
import threading

import pytest

from megastar.config.schema import RunConfig
from megastar.engine import phase
from megastar.engine.exit_codes import RANK_FAILURE
from megastar.engine.fault_tolerance.failure_detector import FailureDetector
from megastar.engine.fault_tolerance.heartbeat import ABORTED, ALIVE, EXITED, OVERDUE, Heartbeat, beat_of, decode
from megastar.engine.fault_tolerance.postmortem import record_lost_rank, write_stacks
from megastar.engine.fault_tolerance.watchdog import Watchdog, watch
from megastar.engine.phase import DATA, ENDING, PHASE, SAVING, STARTING, limit_of
from megastar.parallel.signed_store import SignedStore
from megastar.run_dir.events import read_events
from tests.unit.parallel.test_signed_store import Plain

TICK = 1.0


@pytest.fixture(autouse=True)
def fresh():
    PHASE.reset()
    yield
    PHASE.reset()


def config(**faults: float) -> RunConfig:
    cfg = RunConfig()
    cfg.faults.hang_timeout, cfg.faults.lost_timeout = 100.0, 20.0
    for name, value in faults.items():
        setattr(cfg.faults, name, value)
    return cfg


class Ranks:
    """The detector of rank ``rank`` and the heartbeats it receives, second by second of a clock that the test moves."""

    def __init__(self, cfg: RunConfig, rank: int = 0, world: int = 4):
        PHASE.begin(1)
        PHASE.begin(2)  # behind the first step, which may take longer
        PHASE.at("asking all ranks")
        self.detector, self.now, self.beat = FailureDetector(cfg, rank, TICK, "node0"), 0.0, 0
        self.others = {
            r: Heartbeat(r, f"node{r}", 100 + r, step=2, phase="asking all ranks", collectives=9) for r in range(world)
        }
        self.me = self.others.pop(rank)
        self.detector.advance(0.0)

    def seconds(self, count: int, silent: tuple[int, ...] = (), contact: bool = True):
        """The first diagnosis within so many seconds."""
        for _ in range(count):
            self.now += TICK
            self.beat += 1
            self.detector.advance(self.now)
            for rank, beat in self.others.items():
                if rank not in silent and beat.flag != EXITED:
                    beat.beat = self.beat
            if contact:
                self.detector.receive({r: b.encode() for r, b in self.others.items()})
            if diagnosis := self.detector.diagnose(self.me):
                return diagnosis
        return None

    def set(self, rank: int, **what) -> None:
        for name, value in what.items():
            setattr(self.others[rank], name, value)
        self.others[rank].beat = self.beat + 1


def test_a_silent_rank_is_lost():
    ranks = Ranks(config())
    assert ranks.seconds(5) is None
    diagnosis = ranks.seconds(40, silent=(3,))
    assert diagnosis and (diagnosis.kind, diagnosis.status, [b.rank for b in diagnosis.culprits]) == (
        "lost",
        RANK_FAILURE,
        [3],
    )
    assert diagnosis.text == (
        "rank 3 on node3 (pid 103) has been silent for 21 s (faults.lost_timeout = 20), last seen at "
        '"asking all ranks" of step 2, 9 collectives entered: the process or its host is down'
    )
    assert ranks.now == 5 + 21
    ranks = Ranks(config(lost_timeout=0))
    ranks.seconds(2)
    assert ranks.seconds(90, silent=(3,)) is None


class Overwritten:
    """The heartbeats of ranks 1 and 2 in a signed store; another process writes into it after rank 2 has died."""

    def __init__(self, **faults: float):
        self.plain = Plain()
        self.store = SignedStore(self.plain, b"s")
        self.detector, self.now, self.recorded = FailureDetector(config(**faults), 0, TICK, "node0"), 0.0, list[bytes]()
        self.detector.advance(0.0)

    def silent_after(self, overwrite, live=(1,)) -> float | None:
        """Ten seconds of both ranks, then rank 2 is dead: the seconds until it is reported."""
        beats = {r: Heartbeat(r, f"node{r}", 100 + r, step=2, phase="asking all ranks") for r in (1, 2)}
        for second in range(1000):
            self.now += TICK
            self.detector.advance(self.now)
            for rank in beats if second < 10 else live:
                beats[rank].beat += 1
                self.store.set(f"{rank}", beats[rank].encode())
            if second < 10:
                self.recorded.append(self.plain["2"])
            else:
                overwrite(self, second)
            found = self.store.get_all(["1", "2"])
            forged = {int(key) for key in self.store.forged}
            self.detector.receive({int(key): raw for key, raw in found.items()}, forged)
            if silent := self.detector.silent_ranks(20):
                assert [b.rank for b in silent] == [2]
                return second - 9
        return None


def test_a_repeated_heartbeat_does_not_keep_a_dead_rank_alive():
    def repeat(job: Overwritten, second: int) -> None:
        job.plain["2"] = job.recorded[second % len(job.recorded)]

    job = Overwritten()
    assert (
        job.silent_after(repeat) == 21 and decode(job.detector.beats[2]).beat == 10
    )  # the last one, not a repeated one


def test_a_forged_heartbeat_keeps_a_dead_rank_alive_for_a_limited_time_only():
    def forge(job: Overwritten, second: int) -> None:
        job.plain["2"] = b"." + bytes([second % 256]) * 50

    assert Overwritten().silent_after(forge) == pytest.approx(3 * 20 + 21, abs=2)
    # A rank that is alive is not lost: one of its own heartbeats is enough in this time.
    assert Overwritten().silent_after(lambda job, second: second % 50 and forge(job, second), live=(1, 2)) is None


def test_heartbeats_of_several_threads_have_rising_numbers(tmp_path):
    dog = Watchdog(config(), 0, 1)
    threads = [threading.Thread(target=lambda: [dog._beat() for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raw = dog._beat().encode()
    assert decode(raw).beat == 8001 == beat_of(raw)
    assert beat_of(Heartbeat(1, '"beat": 7, x', 2, beat=12, text='"beat": 9,').encode()) == 12


def test_the_rank_that_was_silent_first_comes_first():
    ranks = Ranks(config(lost_timeout=20, hang_timeout=0))
    ranks.seconds(10)
    assert ranks.seconds(5, silent=(3,)) is None
    ranks.detector.lost_timeout = 0
    assert ranks.seconds(40, silent=(1, 3)) is None
    assert [b.rank for b in ranks.detector.silent_ranks(20)] == [3, 1]


def test_a_rank_that_starts_may_be_silent_for_longer():
    ranks = Ranks(config(hang_timeout=1000))
    ranks.set(3, phase=STARTING, step=0)
    ranks.seconds(2)
    assert ranks.seconds(99, silent=(3,)) is None
    diagnosis = ranks.seconds(5, silent=(3,))
    assert diagnosis and [b.rank for b in diagnosis.culprits] == [3] and 'last seen at "starting"' in diagnosis.text


def test_a_silent_store_is_reported_as_rank_0():
    ranks = Ranks(config(), rank=2)
    ranks.seconds(3)
    diagnosis = ranks.seconds(40, contact=False)
    assert (
        diagnosis
        and [b.rank for b in diagnosis.culprits] == [0]
        and "rank 0 on node0 (pid 100) has not responded" in diagnosis.text
    )


def test_ranks_that_have_left_are_not_lost():
    ranks = Ranks(config())
    ranks.set(1, flag=EXITED, status=0)
    ranks.set(2, flag=EXITED, status=85)
    assert ranks.seconds(60, silent=(1, 2)) is None
    ranks.set(3, flag=EXITED, status=1, text="ValueError: nine")
    assert ranks.seconds(19, silent=(1, 2, 3)) is None  # this rank may be about to fail too
    diagnosis = ranks.seconds(5, silent=(1, 2, 3))
    assert diagnosis and (diagnosis.kind, diagnosis.status) == ("error", RANK_FAILURE)
    assert diagnosis.text == "rank 3 on node3 (pid 103) exited with an error: ValueError: nine"
    ranks = Ranks(config())
    ranks.set(3, flag=EXITED, status=2, text="fix it")
    diagnosis = ranks.seconds(30, silent=(3,))
    assert diagnosis and diagnosis.status == 2  # a batch script must not start it again
    ranks = Ranks(config(), rank=1)
    ranks.set(0, flag=ABORTED, status=RANK_FAILURE, text="rank 3 has been silent")
    diagnosis = ranks.seconds(1)
    assert diagnosis and (diagnosis.kind, diagnosis.text, diagnosis.status) == (
        "",
        "rank 3 has been silent",
        RANK_FAILURE,
    )


@pytest.mark.parametrize(
    ("what", "culprits"),
    [
        ({"collectives": 8, "phase": "forward"}, [2]),
        ({"step": 1, "collectives": 99}, [2]),
        ({"flag": EXITED, "status": 0, "collectives": 99}, [2]),
        ({}, []),
    ],
)
def test_a_hang_names_the_rank_that_is_behind(what, culprits):
    ranks = Ranks(config())
    for rank in (1, 2, 3):
        ranks.set(rank, flag=OVERDUE)
    ranks.set(2, **what)
    ranks.me.collectives = 9
    assert ranks.seconds(100) is None
    diagnosis = ranks.seconds(2)
    assert diagnosis and (diagnosis.kind, diagnosis.status) == ("hang", RANK_FAILURE)
    assert [b.rank for b in diagnosis.culprits] == culprits
    assert ("rank 2 on node2 (pid 102) is behind" in diagnosis.text) == bool(culprits)


def test_a_hang_waits_for_a_rank_that_may_still_be_where_it_is():
    """It waits for S3, say: it is not overdue, the others are."""
    ranks = Ranks(config())
    for rank in (1, 3):
        ranks.set(rank, flag=OVERDUE)
    ranks.set(2, flag=ALIVE, phase=DATA, collectives=8)
    assert ranks.seconds(1000) is None and ranks.detector.overdue
    ranks.set(2, flag=OVERDUE)
    diagnosis = ranks.seconds(1)
    assert diagnosis and [b.rank for b in diagnosis.culprits] == [2]
    ranks = Ranks(config(), rank=1)  # rank 0 decides
    for rank in (0, 2, 3):
        ranks.set(rank, flag=OVERDUE)
    assert ranks.seconds(1000) is None


def test_progress_of_this_rank_counts():
    ranks = Ranks(config())
    for rank in (1, 2, 3):
        ranks.set(rank, flag=OVERDUE)
    for _ in range(20):
        assert ranks.seconds(60) is None
        PHASE.at("backward")
    assert ranks.seconds(120)


def test_time_that_did_not_pass_for_this_process_does_not_count():
    """SIGSTOP, a laptop's sleep: the next tick is late."""
    ranks = Ranks(config())
    for rank in (1, 2, 3):
        ranks.set(rank, flag=OVERDUE)
    ranks.seconds(10)
    for _ in range(5):
        ranks.now += 5000
        assert ranks.seconds(10) is None
    assert ranks.detector.clock == 60 + 5 * TICK
    assert ranks.seconds(18, silent=(1, 2, 3)) is None


def test_limits():
    cfg = config()
    assert limit_of(cfg) == 100 + phase.START_EXTRA  # engines are built
    PHASE.begin(7)
    PHASE.at("forward")
    assert limit_of(cfg) == 100 + phase.START_EXTRA  # the first step of this start
    PHASE.begin(8)
    assert limit_of(cfg) == 100
    PHASE.at(DATA)
    cfg.data.shards = "runs/codes"
    assert limit_of(cfg) == 100
    cfg.data.shards, cfg.data.patience = "s3://bucket/codes", 500
    assert limit_of(cfg) > 100 + 500
    cfg.data.shards, cfg.data.val_shards = "runs/codes", "s3://bucket/val"
    PHASE.at(STARTING)  # the validation images are read
    assert limit_of(cfg) > 100 + 500 + phase.START_EXTRA
    PHASE.at(SAVING)
    assert limit_of(cfg) >= 3700
    PHASE.at(ENDING)
    assert limit_of(cfg) >= 3700
    cfg.train.upload = "s3://bucket/run"
    assert limit_of(cfg) == float("inf")
    PHASE.at("backward")
    cfg.faults.hang_timeout = 0
    assert limit_of(cfg) == float("inf")


# Reports -------------------------------------------------------------------------------------------------------
def test_the_record_for_the_batch_script(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "417")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record_lost_rank(tmp_path, 3, "node7", "lost")
    record_lost_rank(tmp_path, 1, "node2", "hung")
    first, second = (json.loads(line) for line in (tmp_path / "lost.jsonl").read_text().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"job": "417", "attempt": 2, "rank": 3, "host": "node7", "why": "lost"}
    assert (second["rank"], second["why"]) == (1, "hung")
    record_lost_rank(tmp_path / "nothing", 3, "node7", "lost")  # an unwritable disk is not a reason to stop


def test_an_error_of_the_rank_is_one_event(tmp_path):
    cfg = RunConfig(run=str(tmp_path))
    for watched in (True, False):  # once per start
        cfg.faults.hang_timeout, cfg.faults.lost_timeout = (60.0, 60.0) if watched else (0, 0)
        with pytest.raises(ValueError), watch(cfg, 0, 1):
            PHASE.begin(4)
            raise ValueError("two\nlines")
        *_, event = read_events(tmp_path)
        assert (event["event"], event["step"], event["text"]) == ("error", 3, "ValueError: two lines")
    assert len(read_events(tmp_path)) == 2


def held_up(here: threading.Event, gate: threading.Event) -> None:
    here.set()
    gate.wait()


def test_stacks_of_all_threads(tmp_path):
    here, gate = threading.Event(), threading.Event()
    thread = threading.Thread(target=held_up, args=(here, gate), name="patient")
    thread.start()
    try:
        assert here.wait(60)
        error = ValueError("what broke")
        path = write_stacks(tmp_path, 3, "the reason", error)
    finally:
        gate.set()
        thread.join()
    assert path and path.parent == tmp_path / "stacks" and path.name.startswith("rank-00003-")
    text = path.read_text()
    for word in ("the reason", "in held_up", "in test_stacks_of_all_threads", "patient", "ValueError: what broke"):
        assert word in text
    (tmp_path / "file").write_text("")
    assert write_stacks(tmp_path / "file", 3, "the reason") is None
