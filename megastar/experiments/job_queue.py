"""Jobs side by side: each a process with a log of its own, under one live display."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

POLL = 0.2
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Job:
    """``words`` after ``megastar``; ``done`` tells how far it is."""

    run: str
    stage: str
    words: list[str]
    log: Path
    total: int
    done: Callable[[], int] = field(default=lambda: 0)

    @property
    def title(self) -> str:
        return f"{self.run}: {self.stage}"


@dataclass(frozen=True)
class Moment:
    """How far a job is, when, and what its processes have taken of the processors since they started."""

    done: int
    clock: float
    cpu_s: float


@dataclass
class Attempt:
    """A job that came to its end: seconds by the clock, and of the processors."""

    job: Job
    status: int
    seconds: float
    cpu_s: float
    cut: bool  # by the signal that asked us to stop
    steady: tuple[int, float, float]  # how much was done, in which of both seconds, without start-up and the way out


@dataclass
class Running:
    """A job's process; ``first`` and ``last``: when ``done`` was first and last seen to grow."""

    job: Job
    process: subprocess.Popen[bytes]
    start: float
    task: TaskID
    before: int
    first: Moment | None = None
    last: Moment | None = None

    def look(self) -> int:
        done = self.job.done()
        if done > (self.last.done if self.last else self.before):
            self.last = Moment(done, time.perf_counter(), cpu_seconds(self.process.pid))
            self.first = self.first or self.last
        return done

    def steady(self) -> tuple[int, float, float]:
        if self.first is None or self.last is None:
            return 0, 0.0, 0.0
        a, b = self.first, self.last
        return b.done - a.done, b.clock - a.clock, b.cpu_s - a.cpu_s


class QueueStopped(Exception):
    """A signal asked to stop; the jobs have ended."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class Queue:
    """Works off jobs, ``width`` at a time; ``after`` an attempt more may follow, which go first."""

    def __init__(self, width: int, environments: list[dict[str, str]], console: Console):
        assert len(environments) == width
        self.width, self.environments, self.console = width, environments, console
        self.running: dict[int, Running] = {}
        self.asked = 0

    def work(self, jobs: Iterable[Job], after: Callable[[Attempt], list[Job]]) -> None:
        """Until no job is left. Raises ``QueueStopped`` after SIGINT or SIGTERM, when the jobs have saved and ended."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        waiting = deque(jobs)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        former = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            unwatched = not self.console.is_terminal  # each start is a line there instead
            with Progress(
                *columns, console=self.console, refresh_per_second=2, transient=True, disable=unwatched
            ) as bar:
                while waiting or self.running:
                    while waiting and len(self.running) < self.width and not self.asked:
                        self._start(waiting.popleft(), bar)
                    time.sleep(POLL)
                    for slot, one in list(self.running.items()):
                        bar.update(one.task, completed=min(one.job.total, one.look()))
                        attempt = self._ended(slot)
                        if attempt is not None:
                            bar.remove_task(one.task)
                            waiting.extendleft(reversed(after(attempt)))
                    if self.asked and not self.running:
                        raise QueueStopped(self.asked)
        finally:
            self._end_all()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        """The first signal lets the jobs save, the second ends them as they are."""
        if self.asked:
            told, what = "ending at once: what was saved last counts", signal.SIGKILL
        else:
            told, what = "stopping: runs save their state first; once more ends at once", signal.SIGTERM
        self.asked = number
        for one in self.running.values():
            send(one.process, what)
        self.console.print(told, highlight=False)

    def _start(self, job: Job, bar: Progress) -> None:
        slot = next(i for i in range(self.width) if i not in self.running)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ megastar {shlex.join(job.words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "megastar", *job.words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | self.environments[slot],
                start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
                preexec_fn=die_with_parent,
            )  # fmt: skip
        if not self.console.is_terminal:
            self.console.print(f"{job.title} ...", highlight=False)
        task = bar.add_task(job.title, total=job.total)
        self.running[slot] = Running(job, process, time.perf_counter(), task, job.done())
        if self.asked:  # just now
            send(process, signal.SIGTERM)

    def _ended(self, slot: int) -> Attempt | None:
        one = self.running[slot]
        pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
        if not pid:
            return None
        one.process.returncode = code = os.waitstatus_to_exitcode(status)
        del self.running[slot]
        seconds, cpu_s = time.perf_counter() - one.start, usage.ru_utime + usage.ru_stime
        return Attempt(one.job, code, seconds, cpu_s, cut=bool(self.asked and code), steady=one.steady())

    def _end_all(self) -> None:
        """Nothing that was started outlives this command."""
        for one in self.running.values():
            send(one.process, signal.SIGTERM)
        for one in self.running.values():
            one.process.wait()
        self.running.clear()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and those below it, the ended ones that were waited for included."""
    import psutil

    total = 0.0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += sum(one.cpu_times()[:4])  # user, system, and both of its ended children
    except psutil.Error:
        pass
    return total


def send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to a job; one that it cannot heed goes to all its processes, since it could not pass it on."""
    import psutil

    if process.returncode is not None:
        return
    try:
        below = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
        process.send_signal(number)
        for one in below:
            one.send_signal(number)
    except psutil.Error:  # it has just ended
        pass


def die_with_parent() -> None:
    """In the child: a comparison that is killed leaves no run behind, which the next one would start once more."""
    if LIBC is not None:
        LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)


def last_step(metrics: Path) -> int:
    """The step of the newest whole line of a metrics.jsonl, 0 without one."""
    try:
        with metrics.open("rb") as f:
            f.seek(max(0, metrics.stat().st_size - 4096))
            lines = f.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, for the sentence about a failure."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
