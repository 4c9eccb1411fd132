"""Start several local processes of a command. They listen on the loopback interface only (docs/security.md)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import IO

from megastar.commands._shared.common import logging_options, print_error
from megastar.errors import UserError
from megastar.utils.interfaces import LOOPBACK, loopback_environment
from megastar.utils.launcher import LAUNCHED_BY_US, LISTEN_FD
from megastar.utils.signals import STOP_SIGNALS, is_ignored

# Seconds that ranks may take to save after a stop signal, or to end after another rank's failure.
SHUTDOWN_TIMEOUT = 600.0
# Seconds from a rank's failure to SIGTERM for the others: ranks that fail for the same reason end by themselves.
FAILURE_GRACE = 2.0
POLL = 0.05
OF_OTHER_LAUNCHERS = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "CROSS_", "LOCAL_SIZE")


def launch(nproc: int, words: list[str]) -> int:
    """Run ``megastar WORDS`` as ``nproc`` ranks, which ignore --nproc; returns the first failing rank's status, else 0.

    After a stop signal, which the ranks receive too: 128 + its number, or 0 if they finished nonetheless.
    """
    return _Launcher(nproc, words).run()


class _Launcher:
    def __init__(self, nproc: int, words: list[str]):
        self.nproc, self.words = nproc, words
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.errors: list[IO[bytes]] = []  # one per rank, unlinked: no folder outlives the launcher
        self.signal = 0
        self.deadline = float("inf")

    def run(self) -> int:
        signals = [n for n in STOP_SIGNALS if not is_ignored(n)]
        former = {n: signal.signal(n, self._forward) for n in signals}
        former[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        try:
            self._start()
            failed = self._wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            for rank in self.ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
            texts = [self._error_of(file) for file in self.errors]
        if failed is None:
            return 0
        status = self.ranks[failed].returncode
        if status == 2 and texts[failed] and not self.signal:
            raise UserError(texts[failed])
        if status < 0 and not self.signal:
            texts[failed] = f"rank {failed} was killed by {signal.Signals(-status).name}"
        if texts[failed]:
            print_error(texts[failed])
        return 128 + self.signal if self.signal else status if status >= 0 else 128 - status

    def _start(self) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(OF_OTHER_LAUNCHERS)}
        environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.nproc)))
        with socket.create_server((LOOPBACK, 0)) as listening:
            environ |= loopback_environment() | {
                LAUNCHED_BY_US: str(os.getpid()),
                "WORLD_SIZE": str(self.nproc),
                "LOCAL_WORLD_SIZE": str(self.nproc),
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": str(listening.getsockname()[1]),
            }
            for rank in range(self.nproc):
                self.errors.append(tempfile.TemporaryFile())  # noqa: SIM115
                error = self.errors[rank].fileno()
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"/dev/fd/{error}"}
                place |= {LISTEN_FD: str(listening.fileno())} if rank == 0 else {}
                # In a separate session: the terminal's signals reach it once, through the launcher.
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-u", "-m", "megastar", *self.words, *logging_options()],
                        env=environ | place,
                        pass_fds=(error, listening.fileno()) if rank == 0 else (error,),
                        start_new_session=True,
                    )
                )
                if self.signal:
                    self.ranks[-1].send_signal(self.signal)

    def _wait(self) -> int | None:
        """Wait until all ranks have ended; returns the one that failed first."""
        failed: int | None = None
        terminate_at = float("inf")
        while True:
            statuses = [rank.poll() for rank in self.ranks]
            if failed is None and any(statuses):
                # Of several ranks that ended at once, the one with a message.
                bad = [i for i, status in enumerate(statuses) if status]
                failed = next((i for i in bad if self._error_of(self.errors[i])), bad[0])
                self._end_within(SHUTDOWN_TIMEOUT)
                terminate_at = time.monotonic() + FAILURE_GRACE
            if None not in statuses:
                return failed
            if time.monotonic() >= terminate_at:
                terminate_at = float("inf")
                if not self.signal:  # after a stop signal, this one would count as a second one
                    self._send(signal.SIGTERM)
            if time.monotonic() > self.deadline:
                self._send(signal.SIGKILL)
            time.sleep(POLL)

    def _end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)  # no effect on a rank that has ended

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._end_within(SHUTDOWN_TIMEOUT)
        self._send(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z suspends the ranks too, until the launcher continues; their watchdogs do not count the time."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    @staticmethod
    def _error_of(file: IO[bytes]) -> str:
        file.seek(0)
        try:
            return str(json.loads(file.read())["message"])
        except ValueError:  # it is empty
            return ""
