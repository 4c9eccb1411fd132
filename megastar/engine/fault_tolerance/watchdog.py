"""A watchdog per rank: ends a run that hangs or has lost a rank, and reports which rank it was (docs/faults.md).

Three threads that wake once a second. One exchanges heartbeats with the other ranks over the process group's store, one
writes this rank's heartbeat into the run folder, one diagnoses; a network or a disk that blocks delays only its own thread.
Rank 0 watches all ranks, the others watch rank 0 and adopt its diagnosis: traffic per rank does not grow with their number
(heartbeat_digest.py).
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megastar.config.schema import RunConfig
from megastar.engine.exit_codes import CLEAN
from megastar.engine.fault_tolerance.failure_detector import Diagnosis, FailureDetector, place
from megastar.engine.fault_tolerance.heartbeat import (
    ABORTED,
    ALIVE,
    EXITED,
    INVESTIGATING,
    OVERDUE,
    Heartbeat,
    HeartbeatStore,
    flag_of,
)
from megastar.engine.fault_tolerance.heartbeat_digest import read_peers
from megastar.engine.fault_tolerance.postmortem import collectives_entered, print_error, record_lost_rank, write_stacks
from megastar.engine.phase import PHASE, STARTING
from megastar.errors import UserError
from megastar.run_dir.events import append_event
from megastar.run_dir.layout import HEARTBEATS, STACKS
from megastar.utils.clock import utc_now
from megastar.utils.hostname import host_name

REPORT_TIMEOUT = 10.0  # seconds that the disk may take for the final report before the process ends without it
INVESTIGATION_TIME = 10.0  # seconds for finding the rank that broke a connection
FILES_PER_SECOND = 100  # heartbeat files that all ranks together write into the run folder
RETRY = 3.0  # seconds between attempts to reconnect to the store
_starts = 0  # of this process


@contextmanager
def watch(cfg: RunConfig, rank: int, world: int, secret: bytes = b"") -> Iterator[Watchdog]:
    """Watch the ranks inside the block. Called on all of them, once the run folder and the process group exist.

    ``secret``: the secret of the launch, which signs the heartbeats.

    An error of this rank is reported to the others and re-raised. One caused by a rank that is gone ends the process here,
    with a sentence that names the rank.
    """
    dog = Watchdog(cfg, rank, world, secret)
    dog.start()
    try:
        yield dog
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
        dog.close(status, "" if status in CLEAN else f"it exited with status {status}")
        raise
    except BaseException as error:
        if is_from_a_peer(error) and (diagnosis := dog.investigate()):
            dog.abort(diagnosis, error)
        event = " ".join(f"{type(error).__name__}: {error}".split()) if rank == 0 else ""
        dog.close(2 if isinstance(error, UserError) else 1, first_line(error), event)
        raise
    else:
        dog.close(0, "")


def is_from_a_peer(error: BaseException) -> bool:
    """Whether a collective or the store failed, as it does when another rank is gone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


class Watchdog:
    """``start`` it, ``close`` it in the end. ``tick``: seconds between heartbeats."""

    def __init__(self, cfg: RunConfig, rank: int, world: int, secret: bytes = b""):
        global _starts
        _starts += 1
        self.secret = secret
        self.cfg, self.rank, self.world, self.run = cfg, rank, world, Path(cfg.run)
        self.enabled = bool(cfg.faults.hang_timeout or cfg.faults.lost_timeout)
        shortest = min((t for t in (cfg.faults.lost_timeout, cfg.faults.hang_timeout) if t), default=60.0)
        self.tick = min(1.0, max(0.05, shortest / 20))
        self.me = Heartbeat(rank, host_name(), os.getpid(), phase=STARTING)  # the constant fields of its heartbeats
        self.stage, self.status, self.text = "", 0, ""  # stage: INVESTIGATING, EXITED, ABORTED or empty
        self.beat_numbers = itertools.count(1)  # for several threads
        self.peer_beats: dict[int, bytes] = {}  # of the last exchange; replaced, never changed, by the exchange thread
        self.processed = self.peer_beats  # by the detector
        self.retry_at = 0.0
        self.read_all = rank == 0  # else only rank 0's heartbeat is read
        self.over, self.wake, self.sent = threading.Event(), threading.Event(), threading.Event()
        self.ending, self.writing = threading.Lock(), threading.Lock()
        self.threads: list[threading.Thread] = []
        PHASE.reset()
        if rank == 0:
            self._remove_old_files()
        self.store = self._connect() if world > 1 and self.enabled else None
        self.detector = FailureDetector(cfg, rank, self.tick, self.store.host if self.store else "")

    def _remove_old_files(self) -> None:
        """Remove the heartbeats of an earlier start."""
        for path in [*(self.run / HEARTBEATS).glob("rank-*"), self.run / HEARTBEATS / "ended"]:
            with suppress(OSError):
                path.unlink()

    def _connect(self) -> HeartbeatStore | None:
        """None where the process group's store is not a TCPStore or does not respond."""
        try:
            store = HeartbeatStore(self.rank, self.world, _starts, max(5.0, self.cfg.faults.lost_timeout), self.secret)
            store.publish(self.me.encode())
            return store
        except (OSError, RuntimeError, AttributeError) as error:
            print_error(f"rank {self.rank} watches only itself, not the others ({type(error).__name__}: {error})")
            return None

    def start(self) -> None:
        if not self.enabled:
            return
        jobs = [
            ("diagnose", self._diagnose, self.over, self.tick),
            ("file", self._write_file, self.over, max(5 * self.tick, self.world / FILES_PER_SECOND)),
        ]
        if self.store is not None:
            jobs.append(("exchange", self._exchange, self.wake, self.tick))
        for name, *job in jobs:
            thread = threading.Thread(target=self._repeat, args=job, name=f"watchdog-{name}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def _repeat(self, job: Callable[[], None], wake: threading.Event, seconds: float) -> None:
        while not self.over.is_set():
            job()
            if wake.wait(seconds) and wake is not self.over:
                wake.clear()

    # Heartbeats ---------------------------------------------------------------------------------------------------
    def _beat(self) -> Heartbeat:
        return replace(
            self.me,
            flag=self.stage or (OVERDUE if self.detector.overdue else ALIVE),
            beat=next(self.beat_numbers),
            step=PHASE.step,
            phase=PHASE.phase,
            idle_s=round(self.detector.clock - self.detector.moved_at, 1),
            collectives=collectives_entered(),
            status=self.status,
            text=self.text,
        )

    def _exchange(self) -> None:
        """One exchange with the store. After a failure the next waits ``RETRY`` seconds; the detector counts the silence."""
        store, clock = self.store, self.detector.clock
        assert store is not None
        if self.sent.is_set() and self.rank:
            return
        if self.rank and self._has_ended(0):
            if store.closed():
                self.sent.set()  # the store is gone: nothing more can be sent
            if self.stage not in (EXITED, ABORTED) or self.sent.is_set():
                return
        if store.closed():
            store.close()
            if clock < self.retry_at:
                return
            self.retry_at = clock + RETRY
        try:
            if store.store is None:
                store.connect()
            beat = self._beat()
            store.publish(beat.encode())
            self.peer_beats = read_peers(store, self.detector, self.read_all)
            self.retry_at = clock + RETRY
            if beat.flag in (EXITED, ABORTED):
                self.sent.set()
        except (OSError, RuntimeError):
            store.close()

    def _has_ended(self, rank: int) -> bool:
        return rank in self.peer_beats and flag_of(self.peer_beats[rank]) in (EXITED, ABORTED)

    def _write_file(self) -> None:
        path = self.run / HEARTBEATS / f"rank-{self.rank:05d}.json"
        temporary = path.with_suffix(f".{threading.get_ident()}")
        # One write at a time: a slow one must not replace the last heartbeat with an earlier one.
        with self.writing, suppress(OSError):  # a full or read-only disk
            path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({"time": utc_now(), **asdict(self._beat())}) + "\n")
            temporary.replace(path)

    def _diagnose(self) -> None:
        self.detector.advance(time.monotonic())
        if (beats := self.peer_beats) is not self.processed:
            self.processed = beats
            self.detector.receive(beats, self.store.forged() if self.store else set())
        if not self.stage and (diagnosis := self.detector.diagnose(self._beat())):
            self.abort(diagnosis)

    # The end ------------------------------------------------------------------------------------------------------
    def investigate(self) -> Diagnosis | None:
        """Which rank's end broke this rank's connection, found within seconds of the detector's clock, 60 s at most;
        None where no rank has ended."""
        if self.store is None or not self.threads:
            return None
        detector, start = self.detector, self.detector.clock
        self.read_all = True
        self.stage = INVESTIGATING
        limit = max(INVESTIGATION_TIME, 2 * detector.silence)
        latest = time.monotonic() + 6 * limit
        # The detector's clock and the exchange with the store are both slow while this process waits for a processor.
        while detector.clock - start < limit and time.monotonic() < latest:
            self.wake.set()
            time.sleep(self.tick)
            if diagnosis := detector.aborted_peer() or detector.failed_peer(0):
                return diagnosis
            no_contact = detector.clock - detector.contact_at
            if no_contact > detector.silence or (no_contact > max(1.0, 3 * self.tick) and self.store.closed()):
                return detector.store_loss()
            # Peers' heartbeats arrive only while the store responds: without contact the last ones are outdated.
            waited = no_contact < detector.silence / 2 and detector.clock - start > detector.silence
            if waited and (silent := detector.silent_ranks(detector.silence)):
                return detector.loss_of(silent, "and has closed its connections")
        return None

    def abort(self, diagnosis: Diagnosis, error: BaseException | None = None) -> NoReturn:
        """Notify the others, write the report, end this process. A slow disk delays the end by seconds at most."""
        self.ending.acquire()  # never released: a second call waits for the end of the process
        self.text, self.status, self.read_all = diagnosis.text, diagnosis.status, True
        self.stage = ABORTED  # last: the exchange thread may publish it at once
        self.wake.set()

        def report() -> None:
            if diagnosis.kind and self._is_first():
                append_event(self.run, diagnosis.kind, PHASE.done, diagnosis.text)
                if diagnosis.kind != "error":
                    for beat in diagnosis.culprits:
                        record_lost_rank(self.run, beat.rank, beat.host, "hung" if diagnosis.kind == "hang" else "lost")
            write_stacks(self.run, self.rank, f"{diagnosis.text}\nthis rank is at {place(self._beat())}", error)
            self._write_file()

        writer = threading.Thread(target=report, name="watchdog-report", daemon=True)
        writer.start()
        print_error(f"{diagnosis.text} (stacks of rank {self.rank} in {self.run / STACKS})")
        self._wait_for_others(2.0)
        writer.join(REPORT_TIMEOUT)
        os._exit(diagnosis.status)

    def _is_first(self) -> bool:
        """Whether this rank is the first to report why the run ends."""
        try:
            (self.run / HEARTBEATS).mkdir(exist_ok=True)
            os.close(os.open(self.run / HEARTBEATS / "ended", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        except FileExistsError:
            return False
        except OSError:  # a second report is better than none
            return True

    def close(self, status: int, text: str, event: str = "") -> None:
        """Report that this rank exits by itself, with ``text`` where it is an error, and stop the threads.

        ``event``: for events.jsonl, unless another rank was the first. A disk that hangs does not delay the message to
        the others, and delays the end by seconds at most.
        """

        def report() -> None:
            if event and self._is_first():
                append_event(self.run, "error", PHASE.done, event)
            if self.threads:
                self._write_file()

        if self.threads:
            self.ending.acquire()  # from here on a diagnosis no longer aborts this rank
        self.status, self.text, self.read_all = status, text, True
        self.stage = EXITED
        writer = threading.Thread(target=report, name="watchdog-report", daemon=True)
        writer.start()
        self.wake.set()
        if self.threads:
            self._wait_for_others(2.0 if status in CLEAN else REPORT_TIMEOUT)
        writer.join(REPORT_TIMEOUT)
        if not self.threads:
            return
        self.over.set()
        self.wake.set()
        for thread in self.threads:  # one still in C++ while Python shuts down would abort the process
            thread.join(2.0)
        if self.store is not None:
            self.store.close()

    def _wait_for_others(self, patience: float) -> None:
        """Until the last heartbeat is in the store, and, where the store ends with this process, all have read it."""
        if self.store is None or self.store.closed():
            return
        no_contact = self.detector.clock - self.detector.contact_at > max(2.0, 3 * self.tick)
        if (no_contact and patience < REPORT_TIMEOUT) or not self.sent.wait(patience) or self.rank:
            return
        deadline = time.monotonic() + max(2.0, 4 * self.tick)
        while time.monotonic() < deadline and not all(self._has_ended(r) for r in range(1, self.world)):
            self.wake.set()
            time.sleep(0.02)
