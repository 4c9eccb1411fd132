"""The lease of a run folder: one process at a time writes into it.

Its holder locks ``.lock`` (flock), which the kernel releases when the process ends, and describes itself in
``lease.json``, whose time a thread renews. The record names the holder, and replaces the lock if the file system has
none, or if the lock of a lost node remains for a while. A holder is gone if its process has ended (same machine), if
SLURM has requeued its job since, or if its record was not renewed for ``LIMIT`` s by the file server's clock; for
another start of the same launch, ``MISSED`` renewals are enough. A record that is still renewed is never taken over.
A successor writes a record with another token; a former holder that is still alive finds it, and stops writing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megastar.errors import UserError
from megastar.run_dir.layout import CHECKPOINTS, LEASE, LOCK
from megastar.utils.clock import utc_now
from megastar.utils.files import make_folder, read_small, remove_dead_temporaries, write_atomic
from megastar.utils.hostname import host_name
from megastar.utils.lockfile import file_server_time, machine, start_of

RENEW_EVERY = 5.0  # seconds
LIMIT = 60.0  # seconds without a renewal after which the holder on another machine counts as gone
MISSED = 3  # renewals that a holder of the same launch, or of a folder that may have been copied, may miss
REPORT_EVERY = 10.0
MAX_RECORD = 1 << 16  # bytes
logger = logging.getLogger(__name__)
_not_ours: set[str] = set()  # absolute paths of folders that another process holds: no event is written there


class LeaseLost(UserError):
    """Another process has taken over the folder: nothing more may be written there."""


@dataclass(frozen=True)
class Holder:
    """The content of ``lease.json``."""

    command: str
    host: str
    machine: str
    pid: int
    start: str  # of the process, in kernel ticks: process ids are reused
    since: str
    job: str  # SLURM's, and the number of its restarts and its step; empty without SLURM
    restart: str
    step: str
    launch: str  # the id of a torchrun launch, if it has one
    token: str
    lock: int  # inode of the lock file
    folder: str = ""  # device and inode of the folder: those of a copy differ; empty in older records

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.command} (process {self.pid} on {self.host}{job}, since {self.since})"


def read_holder(folder: Path) -> tuple[Holder, float] | None:
    """The record in ``folder`` and its time (seconds since 1970, by the file server's clock), or None."""
    content = read_small(folder / LEASE, MAX_RECORD)
    try:
        found = json.loads(content or b"")
        found = {"folder": ""} | found  # TypeError if it is no dict
        holder = Holder(**{f.name: found[f.name] for f in fields(Holder)})
        if any(type(getattr(holder, f.name)).__name__ != f.type for f in fields(Holder)):
            return None
        with (folder / LEASE).open("rb") as f:  # opened again: NFS returns the server's time, not a cached one
            return holder, os.fstat(f.fileno()).st_mtime
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def held_elsewhere(folder: Path) -> bool:
    """Whether this process has found that another one holds ``folder``."""
    return os.path.abspath(folder) in _not_ours


def in_use(folder: Path) -> bool:
    """Whether ``folder`` has a record of another process, which may have ended."""
    found = read_holder(folder)
    return found is not None and (found[0].machine, found[0].pid) != (machine(), os.getpid())


class RunLease:
    """The lease of ``folder``. Messages contain ``command`` and ``field``, the configuration field of the folder."""

    def __init__(self, folder: Path, command: str, field: str, renew_every: float = RENEW_EVERY, limit: float = LIMIT):
        self.folder, self.command, self.field = folder, command, field
        self.renew_every, self.limit = renew_every, limit
        self.path = folder / LEASE
        self.held = False
        self.lost = ""  # the process that took it over
        self.taken_over = ""  # message about the former holder
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fd = -1

    def acquire(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Create the folder and take its lease; False if ``stop`` ended the wait for a holder that may be gone.

        Raises ``UserError`` if another process holds it, or the folder cannot be written.
        """
        make_folder(self.folder)
        began = reported = time.monotonic()
        watch = _Renewals()
        try:
            self._open_lock()
            while True:
                locked, found = self._lock(), read_holder(self.folder)
                if found is not None:
                    watch.see(found[1], file_server_time(self.folder))
                maybe_copy = found is not None and not watch.renewed and not self._is_original(found[0])
                if found is None or (maybe_copy and (has_ended(found[0]) or watch.silent > MISSED * self.renew_every)):
                    if locked or time.monotonic() - began > self.renew_every:
                        break
                else:
                    holder = found[0]
                    limit = self._limit(holder)
                    gone = None if maybe_copy else self._why_gone(holder, locked, watch.silent, limit)
                    if gone:
                        self.taken_over = f"{self.folder} was held by {holder}, {gone}: taken over"
                        break
                    # An earlier start of this launch may be about to end, on a node that the other nodes have lost.
                    patient = limit < self.limit and time.monotonic() - began < self.limit
                    if gone is not None or (watch.renewed and not patient):
                        self._refuse(holder, watch.age)
                    if time.monotonic() - reported >= REPORT_EVERY:
                        reported = time.monotonic()
                        logger.info(
                            "%s is held by %s, last heartbeat %.0f s ago; taken over after %.0f s without one",
                            self.folder, holder, watch.age, limit,
                        )  # fmt: skip
                if stop():
                    self._drop()
                    _not_ours.add(os.path.abspath(self.folder))
                    return False
                time.sleep(min(1.0, self.renew_every / 5))
            if not self.taken_over and locked is False:
                raise UserError(f"{self.folder} is in use by another process that has just started: wait for it to end")
            self._write(locked)
        except OSError as error:
            self._drop()
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}): make it writable, or choose another {self.field}=..."
            ) from error
        except BaseException:
            self._drop()
            raise
        if self.taken_over:
            logger.warning(self.taken_over)
        for folder in (self.folder, self.folder / CHECKPOINTS):
            remove_dead_temporaries(folder)
        return True

    def _is_original(self, holder: Holder) -> bool:
        """Whether the record belongs to this folder: a copy, made on this machine, has another inode.

        The inode of some network file systems depends on the mount: a record that is renewed is never a copy.
        """
        if machine().split(" ")[1:2] != holder.machine.split(" ")[1:2]:
            return True
        return holder.folder == self._identity() if holder.folder else holder.lock == os.fstat(self._fd).st_ino

    def _identity(self) -> str:
        s = os.stat(self.folder)
        return f"{s.st_dev}:{s.st_ino}"

    def _lock(self) -> bool | None:
        """Whether this process holds the lock file; None if the file system has no locks."""
        try:
            for _ in range(3):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._fd), os.stat(self.folder / LOCK)):
                        break
                os.close(self._fd)  # the file was removed since it was opened, and another process may lock the new one
                self._open_lock()
            return True
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None

    def _open_lock(self) -> None:
        self._fd = -1
        self._fd = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _limit(self, holder: Holder) -> float:
        """Seconds without a renewal after which the holder on another machine counts as gone."""
        same_launch = bool(holder.launch) and holder.launch == launch_id()
        return min(self.limit, MISSED * self.renew_every) if same_launch or in_step_of(holder) else self.limit

    def _why_gone(self, holder: Holder, locked: bool | None, silent: float, limit: float) -> str | None:
        """The reason why the holder is gone; empty: it is alive; None: unknown."""
        here, there = machine().split(" ")[1:], holder.machine.split(" ")[1:]
        if is_visible(holder):
            return "which has ended" if has_ended(holder) else ""
        same_lock = os.fstat(self._fd).st_ino == holder.lock
        if here[:1] == there[:1] and here and locked and same_lock:  # a container of this machine
            return "which has ended"
        if is_successor(holder):
            return "an earlier start of this job"
        return f"which sent no heartbeat for {silent:.0f} s" if silent > limit else None

    def _refuse(self, holder: Holder, age: float) -> None:
        how = f"scancel {holder.job}" if holder.job else f"kill {holder.pid} on {holder.host}"
        raise UserError(
            f"{self.folder} is in use by {holder}, last heartbeat {age:.0f} s ago: wait until it ends, stop it ({how}), "
            f"or choose another {self.field}=..."
        )

    def _write(self, locked: bool | None) -> None:
        e = os.environ
        self.holder = Holder(
            self.command, host_name(), machine(), os.getpid(), start_of(os.getpid()), utc_now(),
            e.get("SLURM_JOB_ID", ""), e.get("SLURM_RESTART_COUNT", "0"), e.get("SLURM_STEP_ID", ""), launch_id(),
            uuid.uuid4().hex, os.fstat(self._fd).st_ino, self._identity(),
        )  # fmt: skip
        try:
            self._write_record()
        except OSError as error:
            if not locked or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            logger.warning(
                "%s cannot be written (%s): only the lock file guards the run folder", self.path, error.strerror
            )
        if not locked:  # another process may do the same at the same time: the last record is valid
            time.sleep(min(1.0, self.renew_every / 2))
            found = read_holder(self.folder)
            if found is not None and found[0].token != self.holder.token:
                self._refuse(found[0], 0.0)
        self.held, self.lost = True, ""
        _not_ours.discard(os.path.abspath(self.folder))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _write_record(self) -> None:
        write_atomic(self.path, json.dumps(asdict(self.holder)).encode() + b"\n")

    def _renew(self) -> None:
        while not self._stop.wait(self.renew_every):
            with suppress(OSError):  # a full disk, or one that does not respond
                if self._is_ours():
                    try:
                        os.utime(self.path)
                    except FileNotFoundError:
                        if self.folder.is_dir():
                            self._write_record()

    def _is_ours(self) -> bool:
        """Whether the record still belongs to this process; sets ``lost``."""
        found = read_holder(self.folder)
        if found is not None and found[0].token != self.holder.token:
            self.lost = str(found[0])
            _not_ours.add(os.path.abspath(self.folder))
        return not self.lost

    def check(self) -> None:
        """Raise ``LeaseLost`` if another process has taken over the folder. Called before something is written there."""
        if self.held and not self._is_ours():
            raise LeaseLost(
                f"{self.folder} was taken over by {self.lost}: this process ({os.getpid()} on {host_name()}) writes "
                "nothing more there and ends"
            )

    def release(self) -> None:
        """Release the lease."""
        if self.held:
            self._stop.set()
            if self._thread is not None:
                self._thread.join(2 * self.renew_every)
            with suppress(OSError):
                if self._is_ours():
                    self.path.unlink(missing_ok=True)
            self.held = False
        self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked process may have the file open
            os.close(self._fd)
            self._fd = -1


@contextmanager
def hold(folder: Path, command: str, field: str) -> Iterator[RunLease]:
    """Hold the lease of ``folder`` in the block. Raises ``UserError``."""
    lease = RunLease(folder, command, field)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def is_visible(holder: Holder) -> bool:
    """Whether the holder is a process of this boot of this machine with the same process ids as this one."""
    here = machine().split(" ")[1:]
    return len(here) == 2 and here == holder.machine.split(" ")[1:]


def has_ended(holder: Holder) -> bool:
    """Whether the holder certainly has ended."""
    return is_visible(holder) and start_of(holder.pid) != holder.start


def is_successor(holder: Holder) -> bool:
    """Whether SLURM has requeued the holder's job and this process belongs to the later start: SLURM has ended the
    former one, or lost its node."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    if not holder.job or holder.job != os.environ.get("SLURM_JOB_ID"):
        return False
    numbers = all(text.isascii() and text.isdigit() and len(text) < 20 for text in (holder.restart, restart))
    return numbers and int(restart) > int(holder.restart)


def in_step_of(holder: Holder) -> bool:
    """Whether this process and the holder belong to the same SLURM job step, whose launcher may have restarted its ranks.
    Two steps of one allocation may be two runs."""
    e = os.environ
    mine = e.get("SLURM_JOB_ID", ""), e.get("SLURM_RESTART_COUNT", "0"), e.get("SLURM_STEP_ID", "")
    return all(mine) and mine == (holder.job, holder.restart, holder.step)


class _Renewals:
    """What a process that waits for a lease sees of its renewals."""

    def __init__(self) -> None:
        self.renewed = False  # since the first look
        self.age = self.silent = 0.0  # seconds since the last renewal: by the file server's clock; also by this one
        self._first = self._last = -1.0
        self._since = 0.0

    def see(self, renewed: float, now: float) -> None:
        """``renewed``: the record's time, ``now``: the time, both by the file server's clock."""
        if self._first < 0:
            self._first = renewed
        if renewed != self._last:
            self._last, self._since = renewed, time.monotonic()
        self.renewed = self.renewed or renewed > self._first
        self.age = max(0.0, now - renewed)
        self.silent = max(self.age, time.monotonic() - self._since)  # the record's time may be in the future


def launch_id() -> str:
    """The id of torchrun's rendezvous; empty unless it was set explicitly."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name
