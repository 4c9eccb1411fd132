"""A watchdog a rank: ends a run that hangs, or that lost a rank, and says which rank it was (docs/faults.md).

Three threads that wake once a second. One exchanges signs of life with the other ranks over the process group's store,
one writes this rank's into the run folder, one judges; a network or a disk that blocks holds up only its own thread.
Rank 0 judges all, the others judge rank 0 and take over what it found: their traffic does not grow with their number.
"""

from __future__ import annotations

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
from megastar.engine.fault_tolerance.failure_detector import Diagnosis, FailureDetector, place, zero_keeps_store
from megastar.engine.fault_tolerance.heartbeat import (
    ALIVE,
    ENDED,
    INVESTIGATING,
    LEFT,
    OVERDUE,
    Heartbeat,
    HeartbeatStore,
)
from megastar.engine.fault_tolerance.postmortem import collectives_entered, print_error, record_lost_rank, write_stacks
from megastar.engine.phase import PHASE, STARTING
from megastar.errors import UserError
from megastar.run_dir.events import append_event
from megastar.run_dir.layout import HEARTBEATS, STACKS
from megastar.utils.clock import utc_now
from megastar.utils.hostname import host_name

LAST_WORDS = 10.0  # seconds that a disk may take for the stacks before the rank ends without them
PUZZLE = 10.0  # seconds for finding out whose end broke a connection
RETRY = 3.0  # seconds between attempts to reach a store that broke the connection
_starts = 0  # of this process


@contextmanager
def watch(cfg: RunConfig, rank: int, world: int) -> Iterator[Watchdog]:
    """Watch over the ranks inside; called on all of them, once the run folder and the process group exist.

    An error that is this rank's own goes on as it is, and the others learn of it. One that came from a rank that is
    gone ends the process here, with the sentence that names the rank.
    """
    dog = Watchdog(cfg, rank, world)
    dog.start()
    try:
        yield dog
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        dog.leave(status, "" if status in CLEAN else f"it left with status {status}")
        raise
    except BaseException as error:
        if is_from_a_peer(error) and (verdict := dog.explain()):
            dog.end(verdict, error)
        event = " ".join(f"{type(error).__name__}: {error}".split()) if rank == 0 else ""
        dog.leave(2 if isinstance(error, UserError) else 1, first_line(error), event)
        raise
    else:
        dog.leave(0, "")


def is_from_a_peer(error: BaseException) -> bool:
    """Whether a collective or the store failed, as it does when another rank is gone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


class Watchdog:
    """``start`` it, ``leave`` in the end. ``tick``: seconds between signs of life."""

    def __init__(self, cfg: RunConfig, rank: int, world: int):
        global _starts
        _starts += 1
        self.cfg, self.rank, self.world, self.run = cfg, rank, world, Path(cfg.run)
        self.wanted = bool(cfg.faults.hang_timeout or cfg.faults.lost_timeout)
        shortest = min((t for t in (cfg.faults.lost_timeout, cfg.faults.hang_timeout) if t), default=60.0)
        self.tick = min(1.0, max(0.05, shortest / 20))
        self.me = Heartbeat(rank, host_name(), os.getpid(), phase=STARTING)  # what never changes of its signs
        self.stage, self.status, self.text = "", 0, ""  # stage: PUZZLED, LEFT, ENDED or nothing
        self.beats = 0
        self.said: dict[int, bytes] = {}  # by the others; replaced, never changed, by the thread that talks
        self.contacts = self.judged = 0  # exchanges with the store, and those that the judge knows of
        self.retry_at = 0.0
        self.everyone = rank == 0  # read all ranks' signs, or rank 0's alone
        self.over, self.nudge, self.sent = threading.Event(), threading.Event(), threading.Event()
        self.ending = threading.Lock()
        self.threads: list[threading.Thread] = []
        PHASE.reset()
        if rank == 0:
            self._tidy()
        self.line = self._join() if world > 1 and self.wanted else None
        self.judge = FailureDetector(cfg, rank, self.tick, self.line.host if self.line else "")

    def _tidy(self) -> None:
        """Remove what the ranks of the start before said."""
        for path in [*(self.run / HEARTBEATS).glob("rank-*"), self.run / HEARTBEATS / "ended"]:
            with suppress(OSError):
                path.unlink()

    def _join(self) -> HeartbeatStore | None:
        """The line to the other ranks; None where the process group's store is none that a thread can talk to."""
        try:
            line = HeartbeatStore(self.rank, self.world, _starts, max(5.0, self.cfg.faults.lost_timeout))
            line.publish(self.me.encode())
            return line
        except (OSError, RuntimeError, AttributeError) as error:
            print_error(f"rank {self.rank} cannot watch the others ({type(error).__name__}: {error}), only itself")
            return None

    def start(self) -> None:
        if not self.wanted:
            return
        jobs: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
            ("judge", self._judge, lambda: self._sleep(self.tick)),
            ("file", self._write_file, lambda: self._sleep(5 * self.tick)),
        ]
        if self.line is not None:
            jobs.append(("talk", self._talk, self._doze))
        for name, *job in jobs:
            thread = threading.Thread(target=self._repeat, args=job, name=f"watchdog-{name}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def _repeat(self, job: Callable[[], None], rest: Callable[[], None]) -> None:
        while not self.over.is_set():
            job()
            rest()

    def _sleep(self, seconds: float) -> None:
        self.over.wait(seconds)

    def _doze(self) -> None:
        self.nudge.wait(self.tick)
        self.nudge.clear()

    # Signs of life ------------------------------------------------------------------------------------------------
    def _beat(self) -> Heartbeat:
        self.beats += 1
        return replace(
            self.me,
            flag=self.stage or (OVERDUE if self.judge.overdue else ALIVE),
            beat=self.beats,
            step=PHASE.step,
            phase=PHASE.phase,
            idle_s=round(self.judge.clock - self.judge.moved_at, 1),
            collectives=collectives_entered(),
            status=self.status,
            text=self.text,
        )

    def _talk(self) -> None:
        """One exchange. After one that failed the next waits a while; the judge counts the silence."""
        line, clock = self.line, self.judge.clock
        assert line is not None
        if self.sent.is_set() and not self._stays():
            return
        if self.rank and zero_keeps_store() and self._flag_of(0) in (LEFT, ENDED):
            if line.closed():
                self.sent.set()  # nobody listens any more
            if self.stage not in (LEFT, ENDED) or self.sent.is_set():
                return
        if line.closed():
            line.close()
            if clock < self.retry_at:
                return
            self.retry_at = clock + RETRY
        try:
            if line.store is None:
                line.connect()
            beat = self._beat()
            line.publish(beat.encode())
            self.said = line.read(self._others() if self.everyone else [0] * (self.rank != 0))
            self.contacts += 1
            self.retry_at = clock + RETRY
            if beat.flag in (LEFT, ENDED):
                self.sent.set()
        except (OSError, RuntimeError):
            line.close()

    def _flag_of(self, rank: int) -> str:
        return chr(self.said[rank][0]) if rank in self.said else ""

    def _stays(self) -> bool:
        """Whether the store ends with this process, which therefore listens until the others have heard it."""
        return self.rank == 0 and zero_keeps_store()

    def _others(self) -> list[int]:
        return [r for r in range(self.world) if r != self.rank]

    def _write_file(self) -> None:
        path = self.run / HEARTBEATS / f"rank-{self.rank:05d}.json"
        temporary = path.with_suffix(f".{threading.get_ident()}")
        now = utc_now()
        with suppress(OSError):  # a full or read-only disk
            path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({"time": now, **asdict(self._beat())}) + "\n")
            temporary.replace(path)

    def _judge(self) -> None:
        self.judge.advance(time.monotonic())
        if self.contacts != self.judged:
            self.judged = self.contacts
            self.judge.hear(self.said)
        if not self.stage and (verdict := self.judge.verdict(self._beat())):
            self.end(verdict)

    # The end ------------------------------------------------------------------------------------------------------
    def explain(self) -> Diagnosis | None:
        """Which rank's end broke this rank's connection, found out within seconds; None: nobody's."""
        if self.line is None or not self.threads:
            return None
        judge, began = self.judge, self.judge.clock
        self.everyone = True
        self.stage = INVESTIGATING
        deadline = time.monotonic() + max(PUZZLE, 2 * judge.silence)
        while time.monotonic() < deadline:
            self.nudge.set()
            time.sleep(self.tick)
            if verdict := judge.told() or judge.failed(0):
                return verdict
            if judge.clock - judge.contact_at > max(1.0, 3 * self.tick) and self.line.closed():
                return judge.cut_off()
            if judge.clock - judge.contact_at > judge.silence:  # nobody is heard: it is the store that is silent
                return judge.cut_off()
            # Of the others a rank hears only while it asks the store: without an answer what it last heard is old.
            answered = judge.clock - judge.contact_at < judge.silence / 2
            if answered and judge.clock - began > judge.silence and (silent := judge.silent(judge.silence)):
                return judge.lost_verdict(silent, "and has closed its connections")
        return None

    def end(self, verdict: Diagnosis, error: BaseException | None = None) -> NoReturn:
        """Tell, leave evidence, end this process; the disk may take seconds for it, no more."""
        self.ending.acquire()  # for good: a second call waits for the end of the process
        self.text, self.status, self.everyone = verdict.text, verdict.status, True
        self.stage = ENDED  # last: the others may read it at once
        self.nudge.set()

        def last_words() -> None:
            if verdict.kind and self.is_first():
                append_event(self.run, verdict.kind, PHASE.done, verdict.text)
                if verdict.kind != "error":
                    for beat in verdict.culprits:
                        record_lost_rank(self.run, beat.rank, beat.host, "hung" if verdict.kind == "hang" else "lost")
            write_stacks(self.run, self.rank, f"{verdict.text}\nthis rank is at {place(self._beat())}", error)
            self._write_file()

        writer = threading.Thread(target=last_words, name="watchdog-last-words", daemon=True)
        writer.start()
        print_error(f"{verdict.text} (stacks of rank {self.rank} in {self.run / STACKS})")
        self._wait_for_others(2.0)
        writer.join(LAST_WORDS)
        os._exit(verdict.status)

    def is_first(self) -> bool:
        """Whether this rank is the first to say why the run ends: once is enough."""
        try:
            (self.run / HEARTBEATS).mkdir(exist_ok=True)
            os.close(os.open(self.run / HEARTBEATS / "ended", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        except FileExistsError:
            return False
        except OSError:  # better twice than never
            return True

    def leave(self, status: int, text: str, event: str = "") -> None:
        """This rank ends by itself, with ``text`` where it is an error; the threads are over when this returns.

        ``event``: for events.jsonl, unless another rank was the first. A disk that hangs holds up neither the word to the
        others nor, for long, the end.
        """

        def last_words() -> None:
            if event and self.is_first():
                append_event(self.run, "error", PHASE.done, event)
            if self.threads:
                self._write_file()

        if self.threads:
            self.ending.acquire()  # a verdict that comes now is not this rank's business any more
        self.status, self.text, self.everyone = status, text, True
        self.stage = LEFT
        writer = threading.Thread(target=last_words, name="watchdog-last-words", daemon=True)
        writer.start()
        self.nudge.set()
        if self.threads:
            self._wait_for_others(2.0 if status in CLEAN else LAST_WORDS)
        writer.join(LAST_WORDS)
        if not self.threads:
            return
        self.over.set()
        self.nudge.set()
        for thread in self.threads:  # one that lives on in C++ while Python ends would abort the process
            thread.join(2.0)
        if self.line is not None:
            self.line.close()

    def _wait_for_others(self, patience: float) -> None:
        """Until the last word is in the store, and, where the store ends with this process, until all have read it."""
        if self.line is None or self.line.closed():
            return
        cut_off = self.judge.clock - self.judge.contact_at > max(2.0, 3 * self.tick)
        if (cut_off and patience < LAST_WORDS) or not self.sent.wait(patience) or not self._stays():
            return
        deadline = time.monotonic() + max(2.0, 4 * self.tick)
        while time.monotonic() < deadline and not all(self._flag_of(r) in (LEFT, ENDED) for r in self._others()):
            self.nudge.set()
            time.sleep(0.02)
