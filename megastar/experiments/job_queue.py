"""Jobs that run concurrently: each a process with its own log, all in one progress display."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from megastar.utils.progress_bar import LOG_EVERY, time_left
from megastar.utils.signals import STOP_SIGNALS, is_ignored

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

POLL = 0.2
logger = logging.getLogger(__name__)
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Job:
    """``args`` of ``megastar``; ``done`` returns its progress, up to ``total``."""

    run: str
    stage: str
    args: list[str]
    log: Path
    total: int
    done: Callable[[], int] = field(default=lambda: 0)

    @property
    def title(self) -> str:
        return f"{self.run}: {self.stage}"


class Steady(NamedTuple):
    """Progress and wall-clock time: at a moment, or between two. As a difference it excludes start-up and exit."""

    done: int = 0
    seconds: float = 0.0


@dataclass
class Attempt:
    """A job that has ended: its wall-clock and CPU time."""

    job: Job
    status: int
    seconds: float
    cpu_s: float
    interrupted: bool  # by the signal that stopped the queue


@dataclass
class Running:
    """A job's process; ``first`` and ``last``: when ``done`` was first and last seen to increase."""

    job: Job
    process: subprocess.Popen[bytes]
    start: float
    task: TaskID
    before: int
    first: Steady | None = None
    last: Steady = Steady()

    def update(self) -> int:
        done = self.job.done()
        if done > max(self.before, self.last.done):
            self.last = Steady(done, time.perf_counter())
            self.first = self.first or self.last
        return done

    def steady(self) -> Steady:
        (done, seconds), last = self.first or self.last, self.last
        return Steady(last.done - done, last.seconds - seconds)


class QueueStopped(Exception):
    """A signal stopped the queue; the jobs have ended."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class JobQueue:
    """Runs as many jobs at a time as there are ``environments``, each with its own."""

    def __init__(self, environments: list[dict[str, str]], console: Console):
        self.environments, self.console = environments, console
        self.running: dict[int, Running] = {}
        self.stop_signal = 0
        self.message = ""  # from the signal handler, which must not print while the console is printing

    def run(self, jobs: Iterable[Job], after: Callable[[Attempt], list[Job]]) -> None:
        """Run all jobs, and those that ``after`` returns for an ended one, which go first.

        Raises ``QueueStopped`` after a signal of STOP_SIGNALS, when the jobs have saved and ended.
        """
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        waiting = deque(jobs)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        caught = [s for s in STOP_SIGNALS if not is_ignored(s)]
        handlers = {s: signal.signal(s, self._handle_signal) for s in caught}
        logged = time.perf_counter()
        try:
            hidden = not self.console.is_terminal  # then a line is printed per start, and every LOG_EVERY seconds
            with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
                while waiting or self.running:
                    while waiting and len(self.running) < len(self.environments) and not self.stop_signal:
                        self._start(waiting.popleft(), bar)
                    time.sleep(POLL)
                    self._print_message()
                    if hidden and time.perf_counter() - logged >= LOG_EVERY:
                        logged = time.perf_counter()
                        logger.info(self._progress(len(waiting)))
                    for slot, one in list(self.running.items()):
                        bar.update(one.task, completed=min(one.job.total, one.update()))
                        attempt = self._poll(slot)
                        if attempt is not None:
                            bar.remove_task(one.task)
                            waiting.extendleft(reversed(after(attempt)))
                    if self.stop_signal and not self.running:
                        break
        finally:
            self._end_all()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stop_signal:  # it may have arrived when the last job had ended
            self._print_message()
            raise QueueStopped(self.stop_signal)

    def _print_message(self) -> None:
        if self.message:
            message, self.message = self.message, ""
            self.console.print(message, highlight=False)

    def _progress(self, waiting: int) -> str:
        """What the running jobs have done, with the time that each still needs."""
        jobs = []
        for one in self.running.values():
            steady, done = one.steady(), one.last.done or one.before
            left = time_left(one.job.total - done, steady.done / steady.seconds if steady.seconds else 0.0)
            jobs.append(f"{one.job.title} {done} of {one.job.total}" + (f", {left}" if left else ""))
        return "; ".join([*jobs, f"{waiting} jobs wait"])

    def _handle_signal(self, number: int, frame: object) -> None:
        """The first signal lets the jobs save, the second one kills them."""
        if self.stop_signal:
            self.message, forwarded = "killing the runs: they resume from their last checkpoint", signal.SIGKILL
        else:
            self.message = "stopping: the runs save a checkpoint first; repeat the signal to kill them"
            forwarded = signal.SIGTERM
        self.stop_signal = number
        for one in self.running.values():
            send_signal(one.process, forwarded)

    def _start(self, job: Job, bar: Progress) -> None:
        slot = next(i for i in range(len(self.environments)) if i not in self.running)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ megastar {shlex.join(job.args)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "megastar", *job.args],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | self.environments[slot],
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
                preexec_fn=die_with_parent,
            )  # fmt: skip
        if not self.console.is_terminal:
            self.console.print(f"{job.title} ...", highlight=False)
        task = bar.add_task(job.title, total=job.total)
        self.running[slot] = Running(job, process, time.perf_counter(), task, job.done())
        if self.stop_signal:  # it arrived during this start
            send_signal(process, signal.SIGTERM)

    def _poll(self, slot: int) -> Attempt | None:
        one = self.running[slot]
        pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
        if not pid:
            return None
        one.process.returncode = code = os.waitstatus_to_exitcode(status)
        del self.running[slot]
        seconds, cpu_s = time.perf_counter() - one.start, usage.ru_utime + usage.ru_stime
        return Attempt(one.job, code, seconds, cpu_s, bool(self.stop_signal and code))

    def _end_all(self) -> None:
        """No job outlives this command."""
        for one in self.running.values():
            send_signal(one.process, signal.SIGTERM)
        for one in self.running.values():
            one.process.wait()
        self.running.clear()


def send_signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a job; SIGKILL, which it cannot forward, goes to all of its processes."""
    if process.returncode is not None:
        return
    with suppress(psutil.Error):  # it has ended
        children = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
        os.kill(process.pid, number)  # Popen's own method reaps a job that has just ended, and its status would be lost
        for one in children:
            one.send_signal(number)


def die_with_parent() -> None:
    """In the child: end with the parent, since the next comparison would start the same run again."""
    if LIBC is not None:
        LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)


def last_step(metrics: Path) -> int:
    """The step of the newest complete line of a metrics.jsonl, 0 without one."""
    with suppress(OSError), metrics.open("rb") as f:
        f.seek(max(0, metrics.stat().st_size - 4096))
        for line in reversed(f.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log that are not blank."""
    with suppress(OSError):
        return "\n".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:])
    return ""
