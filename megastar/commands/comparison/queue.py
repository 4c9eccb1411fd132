"""Jobs side by side: each a process with a log of its own, under one live display."""

from __future__ import annotations

import ctypes
import json
import os
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


@dataclass
class Attempt:
    """A job that came to its end: seconds by the clock, and of the processors."""

    job: Job
    status: int
    seconds: float
    cpu_s: float
    cut: bool  # by the signal that asked us to stop


class Stopped(Exception):
    """A signal asked to stop; the jobs have ended."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class Queue:
    """Works off jobs, ``width`` at a time; ``after`` an attempt more may follow, which go first."""

    def __init__(self, width: int, environments: list[dict[str, str]], console: Console):
        assert len(environments) == width
        self.width, self.environments, self.console = width, environments, console
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes], float, object]] = {}
        self.asked = 0

    def work(self, jobs: Iterable[Job], after: Callable[[Attempt], list[Job]]) -> None:
        """Until no job is left. Raises ``Stopped`` after SIGINT or SIGTERM, when the jobs have saved and ended."""
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
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        former = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Progress(*columns, console=self.console, refresh_per_second=2) as bar:
                while waiting or self.running:
                    while waiting and len(self.running) < self.width and not self.asked:
                        self._start(waiting.popleft(), bar)
                    time.sleep(POLL)
                    for slot, (job, _, _, task) in list(self.running.items()):
                        bar.update(task, completed=min(job.total, job.done()))
                        attempt = self._ended(slot)
                        if attempt is not None:
                            bar.remove_task(task)
                            waiting.extendleft(reversed(after(attempt)))
                    if self.asked and not self.running:
                        raise Stopped(self.asked)
        finally:
            self._end_all()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if not self.asked:
            self.console.print("stopping: runs save their state first; the same command goes on", highlight=False)
        self.asked = number
        for _, process, _, _ in self.running.values():
            send(process, signal.SIGTERM)

    def _start(self, job: Job, bar) -> None:  # type: ignore[no-untyped-def]
        slot = next(i for i in range(self.width) if i not in self.running)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(f"$ megastar {' '.join(job.words)}\n".encode())
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
        self.running[slot] = (job, process, time.perf_counter(), bar.add_task(job.title, total=job.total))

    def _ended(self, slot: int) -> Attempt | None:
        job, process, start, _ = self.running[slot]
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not pid:
            return None
        process.returncode = os.waitstatus_to_exitcode(status)
        del self.running[slot]
        seconds, cpu_s = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
        return Attempt(job, process.returncode, seconds, cpu_s, cut=bool(self.asked and process.returncode))

    def _end_all(self) -> None:
        """Nothing that was started outlives this command."""
        for _, process, _, _ in self.running.values():
            send(process, signal.SIGTERM)
        for _, process, _, _ in self.running.values():
            process.wait()
        self.running.clear()


def send(process: subprocess.Popen[bytes], number: int) -> None:
    if process.returncode is None:
        process.send_signal(number)


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
