"""Detects hangs and lost ranks from heartbeats, and finds the rank at fault.

Time is counted in ticks of the detector's own clock, each at most twice its nominal length: a suspended process, a laptop
that slept or an overloaded machine loses no time.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megastar.config.schema import RunConfig
from megastar.engine.exit_codes import CLEAN, RANK_FAILURE
from megastar.engine.fault_tolerance.heartbeat import ABORTED, EXITED, OVERDUE, Heartbeat, beat_of, decode, flag_of
from megastar.engine.phase import PHASE, STARTING, describe, limit_of
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import HEARTBEATS

START_FACTOR = 5  # a starting rank may be silent this many times longer: imports and compilation can hold Python's lock

FORGED_FACTOR = 3  # a rank whose heartbeats are overwritten by another process may be silent this many times longer


@dataclass
class Diagnosis:
    """Why this rank has to end, and the ranks at fault."""

    kind: str  # of events.jsonl: lost, hang, error; empty: another rank has reported it
    text: str
    culprits: list[Heartbeat] = field(default_factory=list)
    status: int = RANK_FAILURE


class FailureDetector:
    """One per rank. Call ``advance`` at every tick and ``receive`` with the peers' heartbeats, then ``diagnose``.

    ``host``: where the ranks' store lives, empty where this rank exchanges no heartbeats. ``clock`` counts seconds.
    """

    def __init__(self, cfg: RunConfig, rank: int, tick: float, host: str):
        self.cfg, self.rank, self.tick, self.host = cfg, rank, tick, host
        self.lost_timeout = cfg.faults.lost_timeout
        self.silence = max(2.0, 5 * tick)  # after a broken connection, a rank silent for so many seconds is gone
        self.clock = self.moved_at = self.contact_at = 0.0
        self.now: float | None = None
        self.moves = 0
        self.overdue = False
        self.beats: dict[int, bytes] = {}  # rank -> its last heartbeat
        self.newest: dict[int, bytes] = {}  # the same, also of ranks that were not read in the last exchange
        self.changed_at: dict[int, float] = {}  # rank -> when that heartbeat was new, or the rank's key was forged
        self.genuine_at: dict[int, float] = {}  # rank -> when that heartbeat was new

    def advance(self, now: float) -> None:
        """``now``: seconds of any monotonic clock."""
        if self.now is not None:
            self.clock += min(now - self.now, 2 * self.tick)
        self.now = now
        if PHASE.moves != self.moves:
            self.moves, self.moved_at = PHASE.moves, self.clock
        self.overdue = self.clock - self.moved_at > limit_of(self.cfg)

    def receive(self, beats: dict[int, bytes], forged: set[int] | None = None) -> None:
        """Process one exchange with the store. A heartbeat counts as new if its number is higher than all before: an
        unchanged or repeated one is silence. A rank whose heartbeat another process overwrote (``forged``) is not silent
        at once, but after ``FORGED_FACTOR`` times the limit without a heartbeat of its own."""
        gap, self.contact_at = self.clock - self.contact_at, self.clock
        if gap > self.silence:  # the store was suspended: the others could not write to it either
            self.changed_at = {rank: at + gap for rank, at in self.changed_at.items()}
            self.genuine_at = {rank: at + gap for rank, at in self.genuine_at.items()}
        for rank, raw in beats.items():
            if rank not in self.newest or beat_of(raw) > beat_of(self.newest[rank]):
                self.newest[rank] = raw
                self.changed_at[rank] = self.genuine_at[rank] = self.clock
        kept = {rank for rank in forged or () if rank in self.beats}
        most = FORGED_FACTOR * (self.lost_timeout or limit_of(self.cfg))
        self.changed_at |= {rank: self.clock for rank in kept if self.clock - self.genuine_at[rank] <= most}
        self.beats = {rank: self.newest[rank] for rank in kept | set(beats)}

    def diagnose(self, me: Heartbeat) -> Diagnosis | None:
        """``me``: this rank's own heartbeat. None while all is well."""
        failed = self.failed_peer(self.lost_timeout) if self.lost_timeout else None
        return self.aborted_peer() or failed or self.diagnose_loss() or self.diagnose_hang(me)

    def aborted_peer(self) -> Diagnosis | None:
        """The diagnosis that another rank has reported."""
        for raw in list(self.beats.values()):
            if flag_of(raw) == ABORTED:
                beat = decode(raw)
                return Diagnosis("", beat.text, status=beat.status)
        return None

    def failed_peer(self, grace: float) -> Diagnosis | None:
        """A rank that exited with an error at least ``grace`` seconds ago."""
        for rank, raw in list(self.beats.items()):
            exited = flag_of(raw) == EXITED and self.clock - self.changed_at[rank] >= grace
            if exited and (diagnosis := error_of(decode(raw))):
                return diagnosis
        return None

    def silent_ranks(self, seconds: float) -> list[Heartbeat]:
        """Ranks without a new heartbeat for so long, except those that have exited; the longest silent first."""
        running = [(r, raw) for r, raw in list(self.beats.items()) if flag_of(raw) not in (EXITED, ABORTED)]
        running.sort(key=lambda beat: self.changed_at[beat[0]])
        return [decode(raw) for r, raw in running if self.clock - self.changed_at[r] > seconds]

    def diagnose_loss(self) -> Diagnosis | None:
        # With lost_timeout off, rank 0 reports hangs; a rank for which rank 0 itself is silent then has to report.
        limit = self.lost_timeout or (limit_of(self.cfg) if self.rank and self.overdue else 0)
        rank_0_exited = 0 in self.beats and flag_of(self.beats[0]) in (EXITED, ABORTED)
        if not limit or not self.host or rank_0_exited:
            return None
        if self.clock - self.contact_at > limit * (START_FACTOR if PHASE.phase == STARTING else 1):
            return self.store_loss()
        long_silent = self.silent_ranks(START_FACTOR * limit)
        silent = [b for b in self.silent_ranks(limit) if b.phase != STARTING or b in long_silent]
        if silent and self.clock - self.contact_at < limit / 2:
            return self.loss_of(silent, f"(faults.lost_timeout = {limit:g})")
        return None

    def loss_of(self, silent: list[Heartbeat], detail: str) -> Diagnosis:
        for beat in silent[:2]:  # its last heartbeat may not have reached the store
            if diagnosis := self.error_in_file(beat):
                return diagnosis
        seconds = self.clock - max(self.changed_at[b.rank] for b in silent)
        have = "has" if len(silent) == 1 else "have"
        text = f"{names_of(silent)} {have} been silent for {seconds:.0f} s {detail}, last seen at {place(silent[0])}"
        return Diagnosis("lost", f"{text}: the process or its host is down", silent)

    def store_loss(self) -> Diagnosis:
        """The store does not respond: rank 0, which hosts it, is lost."""
        zero = decode(self.beats[0]) if 0 in self.beats else Heartbeat(0, self.host, 0)
        seconds = self.clock - self.contact_at
        text = f"{zero} has not responded for {seconds:.0f} s, last seen at {place(zero)}"
        return self.error_in_file(zero) or Diagnosis("lost", f"{text}: the process or its host is down", [zero])

    def error_in_file(self, last: Heartbeat) -> Diagnosis | None:
        """The error of a rank that exited, from its heartbeat file: the store may not have received it."""
        found: list[Heartbeat] = []

        def read() -> None:
            for row in read_jsonl(Path(self.cfg.run) / HEARTBEATS / f"rank-{last.rank:05d}.json"):
                row.pop("time", None)
                with suppress(TypeError):
                    found.append(Heartbeat(**row))

        reader = threading.Thread(target=read, name="watchdog-read", daemon=True)
        reader.start()
        reader.join(5.0)  # the file system may hang
        same = [b for b in found if (b.pid, b.host, b.flag) == (last.pid, last.host, EXITED)]
        return error_of(same[0]) if same else None

    def diagnose_hang(self, me: Heartbeat) -> Diagnosis | None:
        """A hang is reported once every rank has exceeded the limit of its phase."""
        if not self.overdue or (self.rank and self.host):
            return None
        limit, silent = limit_of(self.cfg), {b.rank for b in self.silent_ranks(self.silence)}
        others = [decode(raw) for raw in list(self.beats.values()) if flag_of(raw) != ABORTED]
        for beat in others:
            gone = beat.rank in silent and self.clock - self.changed_at[beat.rank] > limit
            if beat.flag not in (OVERDUE, EXITED) and not gone:
                return None
        still = f"for {self.clock - self.moved_at:.0f} s (faults.hang_timeout = {self.cfg.faults.hang_timeout:g})"
        if not others:
            return Diagnosis("hang", f"{me} has made no progress {still}: it is at {place(me)}", [me])
        behind = ranks_behind([me, *others], silent)
        if not behind:
            text = f"no rank has made progress {still}: all are at {place(me)}, no rank lags; suspect the network"
            return Diagnosis("hang", text)
        waiting = next(b for b in [me, *others] if b not in behind)
        where = ", ".join(f"{b} is behind, at {place(b)}" for b in behind[:8])
        text = f"no rank has made progress {still}: {where}; the others wait at {place(waiting)}"
        return Diagnosis("hang", text, behind)


def error_of(beat: Heartbeat) -> Diagnosis | None:
    """The diagnosis for a rank that exited with an error; status 2, a user error, is kept on every rank."""
    if beat.status in CLEAN:
        return None
    status = 2 if beat.status == 2 else RANK_FAILURE
    return Diagnosis("error", f"{beat} exited with an error: {beat.text}", [beat], status)


def names_of(beats: list[Heartbeat]) -> str:
    return ", ".join(map(str, beats[:8])) + (f" and {len(beats) - 8} more" if len(beats) > 8 else "")


def place(beat: Heartbeat) -> str:
    entered = f", {beat.collectives} collectives entered" if beat.collectives else ""
    return describe(beat.phase, beat.step) + entered


def ranks_behind(beats: list[Heartbeat], silent: set[int]) -> list[Heartbeat]:
    """The ranks that the others wait for: silent ones, else exited ones, else those with the fewest steps and collectives."""
    for some in ([b for b in beats if b.rank in silent], [b for b in beats if b.flag == EXITED]):
        if some:
            return some
    least = min((b.step, b.collectives) for b in beats)
    some = [b for b in beats if (b.step, b.collectives) == least]
    return some if len(some) < len(beats) else []
