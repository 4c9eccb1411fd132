"""When a run hangs or has lost a rank, and whose fault it is: from the signs of life that a rank has heard.

Time is counted in ticks of the judge's own, each worth two at most: a process that was stopped, a laptop that slept or
a machine that starves its processes has lost no time.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megastar.config.schema import RunConfig
from megastar.engine.exit_codes import CLEAN, RANK_FAILURE
from megastar.engine.fault_tolerance.heartbeat import ENDED, LEFT, OVERDUE, Heartbeat, decode, flag_of
from megastar.engine.phase import PHASE, STARTING, describe, limit_of
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import HEARTBEATS

STARTS = 5  # times longer a rank may be silent while it starts


@dataclass
class Diagnosis:
    """Why this rank ends, and whom it blames."""

    kind: str  # of events.jsonl: lost, hang, error; empty: another rank has written it down
    text: str
    culprits: list[Heartbeat] = field(default_factory=list)
    status: int = RANK_FAILURE


class FailureDetector:
    """Of one rank. ``advance`` at every tick, ``hear`` what the others said; then ask.

    ``host``: where the ranks' store lives, empty where this rank hears no other. ``clock`` counts seconds.
    """

    def __init__(self, cfg: RunConfig, rank: int, tick: float, host: str):
        self.cfg, self.rank, self.tick, self.host = cfg, rank, tick, host
        self.lost_timeout = cfg.faults.lost_timeout
        self.silence = max(2.0, 5 * tick)  # where a connection broke, after so many seconds a rank is gone
        self.clock = self.moved_at = self.contact_at = 0.0
        self.now: float | None = None
        self.moves = 0
        self.overdue = False
        self.heard: dict[int, bytes] = {}
        self.heard_at: dict[int, float] = {}  # when a rank last said something new

    def advance(self, now: float) -> None:
        """``now``: seconds of any clock that never goes back."""
        if self.now is not None:
            self.clock += min(now - self.now, 2 * self.tick)
        self.now = now
        if PHASE.moves != self.moves:
            self.moves, self.moved_at = PHASE.moves, self.clock
        self.overdue = self.clock - self.moved_at > limit_of(self.cfg)

    def hear(self, said: dict[int, bytes]) -> None:
        """The answer of an exchange with the store, rank -> its last sign; the same sign again is silence."""
        self.contact_at = self.clock
        for rank, raw in said.items():
            if raw != self.heard.get(rank):
                self.heard[rank], self.heard_at[rank] = raw, self.clock

    def flag(self, rank: int) -> str:
        """Of its last sign, or nothing."""
        return flag_of(self.heard[rank]) if rank in self.heard else ""

    def verdict(self, me: Heartbeat) -> Diagnosis | None:
        """``me``: this rank as the others see it."""
        failed = self.failed(self.lost_timeout) if self.lost_timeout else None
        return self.told() or failed or self.lost() or self.hang(me)

    def told(self) -> Diagnosis | None:
        """What another rank has found out."""
        for raw in list(self.heard.values()):
            if flag_of(raw) == ENDED:
                beat = decode(raw)
                return Diagnosis("", beat.text, status=beat.status)
        return None

    def failed(self, grace: float) -> Diagnosis | None:
        """A rank that left with an error ``grace`` seconds ago, while this one goes on or waits for it."""
        for rank, raw in list(self.heard.items()):
            if flag_of(raw) == LEFT and self.clock - self.heard_at[rank] >= grace and (found := error_of(decode(raw))):
                return found
        return None

    def silent(self, seconds: float) -> list[Heartbeat]:
        """Ranks that have said nothing new for so long, though they have not left; the longest silent first."""
        there = [(r, raw) for r, raw in list(self.heard.items()) if flag_of(raw) not in (LEFT, ENDED)]
        there.sort(key=lambda said: self.heard_at[said[0]])
        return [decode(raw) for r, raw in there if self.clock - self.heard_at[r] > seconds]

    def lost(self) -> Diagnosis | None:
        # Without the lost time-out it is a hang in which rank 0, which would tell so, is silent itself.
        limit = self.lost_timeout or (limit_of(self.cfg) if self.rank and self.overdue else 0)
        if not limit or not self.host or (zero_keeps_store() and self.flag(0) in (LEFT, ENDED)):
            return None
        if self.clock - self.contact_at > limit * (STARTS if PHASE.phase == STARTING else 1):
            return self.cut_off()
        # A start imports and compiles: it may hold Python's lock, and the watchdog up, for long.
        silent = [b for b in self.silent(limit) if b.phase != STARTING or b in self.silent(STARTS * limit)]
        if silent and self.clock - self.contact_at < limit / 2:
            return self.lost_verdict(silent, f"(faults.lost_timeout = {limit:g})")
        return None

    def lost_verdict(self, silent: list[Heartbeat], more: str) -> Diagnosis:
        for beat in silent[:2]:  # its word may not have come through
            if found := self.left_in_file(beat):
                return found
        seconds = self.clock - max(self.heard_at[b.rank] for b in silent)
        have = "has" if len(silent) == 1 else "have"
        text = f"{names_of(silent)} {have} been silent for {seconds:.0f} s {more}, last seen at {place(silent[0])}"
        return Diagnosis("lost", f"{text}: the process or its host is gone", silent)

    def cut_off(self) -> Diagnosis:
        """The store is silent: the process that keeps it is gone, rank 0's own or the launcher beside it."""
        zero = decode(self.heard[0]) if 0 in self.heard else Heartbeat(0, self.host, 0)
        seconds = self.clock - self.contact_at
        if self.rank == 0 or not zero_keeps_store():
            text = f"the launcher on {self.host}, which keeps the ranks' store, has not answered for {seconds:.0f} s"
            return Diagnosis("lost", f"{text}: it or its host is gone", [zero] if self.rank else [])
        text = f"{zero} has not answered for {seconds:.0f} s, last seen at {place(zero)}"
        return self.left_in_file(zero) or Diagnosis("lost", f"{text}: the process or its host is gone", [zero])

    def left_in_file(self, last: Heartbeat) -> Diagnosis | None:
        """What a rank wrote into the run folder when it left, where the store did not take it, or has left with it."""
        found: list[Heartbeat] = []

        def read() -> None:
            for row in read_jsonl(Path(self.cfg.run) / HEARTBEATS / f"rank-{last.rank:05d}.json"):
                row.pop("time", None)
                with suppress(TypeError):
                    found.append(Heartbeat(**row))

        reader = threading.Thread(target=read, name="watchdog-read", daemon=True)
        reader.start()
        reader.join(5.0)  # the disk may have gone with the host
        same = [b for b in found if (b.pid, b.host, b.flag) == (last.pid, last.host, LEFT)]
        return error_of(same[0]) if same else None

    def hang(self, me: Heartbeat) -> Diagnosis | None:
        """Every rank has been where it is for longer than it may. As long as one still may be there, it is waited for."""
        if not self.overdue or (self.rank and self.host):
            return None
        limit, silent = limit_of(self.cfg), {b.rank for b in self.silent(self.silence)}
        others = [decode(raw) for raw in list(self.heard.values()) if flag_of(raw) != ENDED]
        for beat in others:
            gone = beat.rank in silent and self.clock - self.heard_at[beat.rank] > limit
            if beat.flag not in (OVERDUE, LEFT) and not gone:
                return None
        still = f"for {self.clock - self.moved_at:.0f} s (faults.hang_timeout = {self.cfg.faults.hang_timeout:g})"
        if not others:
            return Diagnosis("hang", f"{me} has not moved {still}: it is at {place(me)}", [me])
        behind = behind_of([me, *others], silent)
        if not behind:
            return Diagnosis("hang", f"no rank has moved {still}: all are at {place(me)}, none is behind; the network?")
        waiting = next(b for b in [me, *others] if b not in behind)
        where = ", ".join(f"{b} is behind, at {place(b)}" for b in behind[:8])
        return Diagnosis("hang", f"no rank has moved {still}: {where}; the others wait at {place(waiting)}", behind)


def error_of(beat: Heartbeat) -> Diagnosis | None:
    """Of a rank that left with an error; a mistake that a person has to mend stays one on every rank."""
    if beat.status in CLEAN:
        return None
    text = f"{beat} ended with an error of its own: {beat.text}"
    return Diagnosis("error", text, [beat], 2 if beat.status == 2 else RANK_FAILURE)


def zero_keeps_store() -> bool:
    """Whether the store lives in rank 0's process; below torchrun it lives in the launcher."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def names_of(beats: list[Heartbeat]) -> str:
    return ", ".join(map(str, beats[:8])) + (f" and {len(beats) - 8} more" if len(beats) > 8 else "")


def place(beat: Heartbeat) -> str:
    entered = f", {beat.collectives} collectives entered" if beat.collectives else ""
    return describe(beat.phase, beat.step) + entered


def behind_of(beats: list[Heartbeat], silent: set[int]) -> list[Heartbeat]:
    """Whom the others wait for: the silent, those that left, else those with the fewest steps and collectives."""
    for some in ([b for b in beats if b.rank in silent], [b for b in beats if b.flag == LEFT]):
        if some:
            return some
    least = min((b.step, b.collectives) for b in beats)
    some = [b for b in beats if (b.step, b.collectives) == least]
    return some if len(some) < len(beats) else []
