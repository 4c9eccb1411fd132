"""Asynchronous saving: copy this rank's shards to host memory, and write them while training continues.

Every rank writes its own files into ``.writing`` and reports their sizes and hashes to rank 0, which waits for all,
writes the manifest, renames the folder and points ``latest`` to it. Threads never use collectives.

A save that fails does not stop the training: it is reported, its files are removed, and it is retried.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastar.checkpoint.shard_format import state_file
from megastar.config.schema import RunConfig
from megastar.engine.checkpointer.s3_upload import Uploader
from megastar.engine.checkpointer.snapshot import Snapshot, Snapshots
from megastar.engine.context import Context
from megastar.engine.phase import ENDING, PHASE
from megastar.engine.rank_sync import from_main, on_main, retry, run_on_main, wait_for
from megastar.engine.zero.engines import Engines, full_shapes, owned, stored_of
from megastar.parallel.signed_store import SignedStore
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.checkpoint_dir import WRITING, folder_of, name_of
from megastar.run_dir.events import append_event
from megastar.run_dir.folder_guard import FolderGuard
from megastar.run_dir.layout import VISIBLE_WITHIN
from megastar.run_dir.lease import RunLease
from megastar.run_dir.manifest import file_problem

UPLOAD_PATIENCE = 86400.0
AGAIN = "run the same command again to upload the rest"
RETRY_EVERY = 60.0  # seconds from a failed save to the next attempt, unless a save is due before
REPORT_EVERY = 600.0  # seconds between reports of saves that keep failing
SLACK = 1 << 20  # bytes, for headers and the manifest
USR1_GRACE = 120.0  # seconds; the batch scripts ask for USR1 three minutes before the end
SHORT_GRACE = 20.0  # seconds; SLURM kills 30 s after TERM
logger = logging.getLogger(__name__)


class Saver:
    """One save at a time. ``save`` returns when the copy is made; ``finish`` when the last save is on disk, or failed.

    Ranks report the state of their files through the process group's key-value store: a thread may use it while
    collectives run, nothing there times out, and no rank has to see another's files before rank 0 does.

    ``problem`` describes the last save if it failed, the same on all ranks; it is cleared when one is complete.
    """

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines, step: int = -1, lease: RunLease | None = None):
        self.cfg, self.ctx, self.engines, self.lease = cfg, ctx, engines, lease
        self.folder = folder_of(cfg.run)
        self.snapshots = Snapshots(cfg, ctx, engines, full_shapes(engines, ctx))
        store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self.store = SignedStore(store, ctx.secret)
        self.token = ""  # of the last save: a name that no other save has, in this job or in one that is dying
        self.step = step  # of the last attempt
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None
        self.problem = ""
        self.uploader = Uploader(cfg.train.upload, cfg.data.patience) if cfg.train.upload and ctx.main else None
        self.guard = FolderGuard(self.folder.parent) if ctx.main else None
        self.done: Path | None = None
        self._due: float | None = None  # when a save that failed is tried again
        self._failures, self._reported_at = 0, 0.0
        self._events: list[tuple[str, dict[str, Any]]] = []
        need = torch.tensor([4 * stored_of(owned(engines, ctx))], dtype=torch.int64, device=ctx.device)
        if ctx.world > 1:
            dist.all_reduce(need)
        self.need = int(need.item()) + SLACK  # bytes of a checkpoint

    @property
    def failed(self) -> bool:
        """Whether a save failed on this rank, or (main rank) a failed one is due again, or the run folder is gone or
        taken over: then all ranks call ``check_folder`` and ``retry_due``."""
        due = self._due is not None and time.monotonic() >= self._due
        gone = self.guard is not None and bool(self.guard.gone())
        lost = self.lease is not None and bool(self.lease.lost)
        return self.error is not None or (self.ctx.main and (due or gone or lost))

    def check_folder(self) -> None:
        """Raise on all ranks: ``UserError`` if the run folder is gone, ``LeaseLost`` if another process has taken it over.
        A collective."""
        run_on_main(self.ctx, self._check_folder)

    def _check_folder(self) -> None:
        if self.guard is not None:
            self.guard.check()
        if self.lease is not None:
            self.lease.check()

    def retry_due(self) -> bool:
        """After a step in which some rank had ``failed``: whether to save now. A collective."""
        self.finish()
        self.check_folder()
        return from_main(self.ctx, self.failed)

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """(message, fields) of the events since the last call. Main rank only."""
        events, self._events = self._events, []
        return events + (self.uploader.take_events() if self.uploader else [])

    def save(self, step: int, metadata: dict[str, Any]) -> float:
        """Save after ``step`` steps; ``metadata`` goes into the manifest. Returns the seconds that it blocked training.

        A save that fails, here or while it is written, sets ``problem``; the former checkpoint stays valid.
        """
        self.finish()
        self.check_folder()
        start = time.perf_counter()
        self.step, self._due = step, None
        self.token = from_main(self.ctx, secrets.token_hex(4))
        self.written = self.folder / WRITING / self.token / name_of(step)
        if problem := on_main(self.ctx, self._prepare):
            self._settle(problem)
            return time.perf_counter() - start
        snapshot = self.snapshots.take(step, metadata)
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="save", daemon=True)
        self.thread.start()
        return time.perf_counter() - start

    def save_with_retry(
        self, step: int, metadata: dict[str, Any], patience: float, stop: Callable[[], bool] = lambda: False
    ) -> str:
        """Save ``step`` unless that is done, with retries for ``patience`` seconds. Called by all ranks alike.

        Returns the last problem, or the empty string. ``stop``, called on the main rank, ends the retries.
        """

        def attempt() -> str:
            self.finish()
            if self.step != step or self.problem:
                self.save(step, metadata)
                self.finish()
            return self.problem

        return retry(self.ctx, attempt, patience, stop)

    def rewind(self, checkpoint: Path, step: int) -> None:
        """The run was rolled back to ``checkpoint``, which is now the newest, in the upload's target too."""
        self.done, self.step = checkpoint, step
        if self.uploader:
            self.uploader.put(checkpoint)

    def disk_shortfall(self, steps: int) -> str:
        """At the start of a run of ``steps`` steps: a message if the disk is too small for the checkpoints that it keeps."""
        t = self.cfg.train
        count = t.keep_last + 1 + bool(t.upload) + t.keep_best + (steps // t.keep_every if t.keep_every else 0)
        try:
            there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.is_dir())
            held = sum(f.stat().st_size for c in checkpoint_dir.complete(self.folder) for f in c.iterdir())
            free = shutil.disk_usage(there).free
        except OSError:
            return ""
        if free + held >= count * self.need:
            return ""
        return (
            f"{self.folder} has {gib(free)} free; {count} checkpoints of {gib(self.need)}, as many as exist at "
            f"once, need {gib(count * self.need - held)} more: free space, or lower train.keep_last or train.keep_every"
        )

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)  # what a killed save left
        free = shutil.disk_usage(self.folder).free
        if free < self.need:
            raise OSError(errno.ENOSPC, f"it needs {gib(self.need)}, {gib(free)} are free")
        self.written.mkdir(parents=True)

    def _write(self, snapshot: Snapshot) -> None:
        """The thread: this rank's files, then a report to rank 0, which completes the checkpoint."""
        note: dict[str, Any] = {}
        try:
            note = {"files": snapshot.write(self.written, self.ctx)}
        except Exception as error:  # of any kind: the loop must know
            self.error = as_os_error(error)
            note = {"problem": f"rank {self.ctx.rank}: {self.error}"}
            for name in (state_file(self.ctx.rank), state_file(self.ctx.rank) + ".tmp"):
                with suppress(OSError):
                    (self.written / name).unlink()  # it may be what fills the disk
        try:
            self.store.set(self._key(self.ctx.rank), json.dumps(note))
        except RuntimeError as error:  # rank 0 has ended, which the loop detects too
            self.error = self.error or as_os_error(error)
        if self.ctx.main:
            problem = ""
            try:
                self.done = self._complete(snapshot.manifest)
            except Exception as error:
                self.error = self.error or as_os_error(error)
                problem = str(error)
                shutil.rmtree(
                    self.written.parent, ignore_errors=True
                )  # not another process's, if it took over the folder
                with suppress(OSError):
                    (self.folder / WRITING).rmdir()
            self.store.set(self._key("all"), problem)

    def _key(self, whose: int | str) -> str:
        return f"megastar/save/{self.token}/{whose}"

    def _complete(self, manifest: dict[str, Any]) -> Path:
        """Rank 0: wait for every rank's report, then publish."""
        files: dict[str, Any] = {}
        problems = []
        for rank in range(self.ctx.world):  # of all ranks: none still writes when the files are removed
            report = json.loads(wait_for(self.store, self._key(rank), f"rank {rank} wrote no files"))
            self.store.delete_key(self._key(rank))  # otherwise the store grows with every save
            problems += [report["problem"]] if "problem" in report else []
            files |= report.get("files", {})
        if problems:
            raise OSError(problems[0])
        manifest |= {"files": dict(sorted(files.items()))}
        self._await_files(manifest)
        if self.lease is not None:
            self.lease.check()
        done = checkpoint_dir.publish(self.folder, name_of(self.step), manifest, self.written)
        used = self.uploader.pending() if self.uploader else set()
        try:
            checkpoint_dir.retire(self.cfg.train, self.folder, used)
        except (OSError, ValueError) as error:  # the checkpoint is complete: no reason to stop
            self._events.append((f"older checkpoints in {self.folder} could not be removed ({error})", {}))
        if self.uploader:
            self.uploader.put(done)
        return done

    def _await_files(self, manifest: dict[str, Any]) -> None:
        """Rank 0: wait until it sees all files of the manifest, which other nodes wrote: file systems may show them late.
        Raises ``OSError`` for one that does not appear: then no checkpoint is published and no older one removed."""
        deadline, missing = time.monotonic() + VISIBLE_WITHIN, list(manifest["files"])
        while True:
            os.scandir(self.written).close()  # NFS compares the folder with the server's when it is opened
            found = {name: file_problem(self.written / name, manifest["files"][name]["bytes"]) for name in missing}
            missing = [name for name in missing if found[name]]
            if not missing:
                return
            if time.monotonic() > deadline:
                name = missing[0]
                raise OSError(
                    f"{self.written / name} of {manifest['files'][name]['whose']} {found[name]} on the node of rank 0, as "
                    f"{len(missing)} of {len(found)} files: the run folder must be the same folder on all nodes"
                )
            time.sleep(0.2)

    def finish(self) -> Path | None:
        """Wait until the save under way is complete or failed, on all ranks alike; the newest complete one of this process."""
        if self.thread is None:
            return self.done
        self.thread.join()
        try:
            problem = wait_for(self.store, self._key("all"), "rank 0 completed no checkpoint")
        except OSError as error:
            problem = str(error)
        self.thread, self.error = None, None
        self._settle(problem)
        return self.done

    def _settle(self, problem: str) -> None:
        """The result of the last attempt, on all ranks alike."""
        if not problem:
            self.done = self.folder / name_of(self.step)
            if self.problem:
                text = f"{self.done} is written, after {self._failures} failed attempts"
                self._events.append((text, {"situation": "save", "over": True}))
            self.problem, self._failures, self._due = "", 0, None
            return
        self._failures += 1
        self._due = time.monotonic() + RETRY_EVERY
        self.problem = self._message(problem)
        if self._failures == 1 or time.monotonic() - self._reported_at >= REPORT_EVERY:
            self._reported_at = time.monotonic()
            more = f"the training continues; the save is retried within {RETRY_EVERY:.0f} s and at the next save point"
            self._events.append((f"{self.problem}; {more}", {"situation": "save"}))

    def close(self) -> str:
        """Wait for the save and the upload under way, on all ranks; returns what was not done, or the empty string.

        No rank may exit while rank 0 still uploads: a launcher takes the first exit for the end of the job.
        """
        self.finish()
        if self.guard:
            self.guard.close()
        if not self.cfg.train.upload:
            return ""
        if self.uploader:
            problem = self.uploader.finish()
            self.store.set(self._key("uploaded"), f"{problem}; {AGAIN}" if problem else "")
        return wait_for(self.store, self._key("uploaded"), "rank 0 did not finish its upload", UPLOAD_PATIENCE)

    def repeat_upload(self) -> None:
        """At a start of a finished run: upload what ``train.upload`` lacks of the newest checkpoint, as a run whose last
        upload failed has left it. Called by all ranks alike. A problem is an event, as at the end of a run."""
        url, run = self.cfg.train.upload, self.folder.parent
        newest = run_on_main(self.ctx, lambda: str(checkpoint_dir.latest(self.folder) or ""))
        if not url or not newest:
            return
        PHASE.at(ENDING)
        self.token = from_main(self.ctx, secrets.token_hex(4))
        if self.ctx.main:
            self.uploader = Uploader(url, self.cfg.data.patience, only_missing=True)
            self.uploader.put(Path(newest))
        problem = self.close()
        if self.uploader is None:
            return
        step, name, count = checkpoint_dir.step_in(Path(newest)), Path(newest).name, self.uploader.sent
        if problem:
            logger.warning(problem)
            append_event(run, "warning", step, problem, situation="upload")
        elif count:
            text = f"{name} was uploaded to {url}: {count} object(s) were missing there"
            logger.info(text)
            append_event(run, "warning", step, text, situation="upload", over=True)
        else:
            logger.info("%s has all of %s: nothing to upload", url, name)

    def _message(self, problem: str) -> str:
        former = self.done
        with suppress(OSError):
            former = checkpoint_dir.latest(self.folder)
        kept = f"{former} stays valid" if former else "there is no earlier checkpoint"
        room = any(w in problem for w in ("No space left", "it needs ", "quota", "File too large"))
        remedy = "free some disk space" if room else f"make {self.folder} writable on every node"
        return f"checkpoint of step {self.step} in {self.folder} could not be written ({problem}); {kept}: {remedy}"


def grace_period(signal_number: int) -> float:
    """Seconds for saving after a stop signal: what is certainly left of the job."""
    return USR1_GRACE if signal_number == signal.SIGUSR1 else SHORT_GRACE


def gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"


def as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
