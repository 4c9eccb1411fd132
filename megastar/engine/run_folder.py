"""The run folder of a training: held by rank 0, with one configuration."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.rank_sync import from_main, on_all_ranks, run_on_main
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import append_event
from megastar.run_dir.layout import VISIBLE_WITHIN
from megastar.run_dir.lease import RunLease
from megastar.utils.files import check_output
from megastar.utils.launcher import place_of
from megastar.utils.signals import StopFlag


def _check_first_save(run: Path) -> None:
    """Raise ``UserError`` if the first checkpoint of a run cannot be saved. Later starts retry their saves."""
    saved = checkpoint_dir.folder_of(run)
    if not (saved.is_dir() and checkpoint_dir.latest(saved)):
        check_output(saved, "the checkpoints of run =", folder=True)


@contextmanager
def hold_run_folder(cfg: RunConfig, ctx: Context, stop: StopFlag) -> Iterator[RunLease]:
    """Hold the run folder's lease on rank 0 in the block. Raises ``UserError`` on all ranks if another process holds it,
    the folder cannot be created or written, or it is not the same folder on all nodes. A stop signal ends the wait for a
    holder that may have ended."""
    run = Path(cfg.run)
    lease = RunLease(run, "megastar train", "run")
    try:
        run_on_main(ctx, lambda: check_output(run, "run =", folder=True))
        run_on_main(ctx, lambda: _check_first_save(run))
        run_on_main(ctx, lambda: lease.acquire(lambda: bool(stop.signal)))
        if lease.taken_over:
            found = checkpoint_dir.latest(checkpoint_dir.folder_of(run))
            append_event(run, "warning", checkpoint_dir.step_in(found) if found else 0, lease.taken_over)
        check_shared(run, ctx)
        yield lease
    finally:
        lease.release()


def check_shared(run: Path, ctx: Context) -> None:
    """Raise ``UserError`` on all ranks if a node does not see what rank 0 writes into the run folder: each node would then
    keep its part of a checkpoint to itself, and none could be resumed. A collective."""
    if ctx.world == 1:
        return
    name = from_main(ctx, f".shared-{secrets.token_hex(4)}")
    host = from_main(ctx, socket.gethostname())
    run_on_main(ctx, (run / name).touch)
    try:
        on_all_ranks(ctx, lambda: _wait_until_seen(run, name, host))
    finally:
        if ctx.main:
            (run / name).unlink(missing_ok=True)


def _wait_until_seen(run: Path, name: str, host: str) -> None:
    if place_of(os.environ).local:  # one rank of a node is enough
        return
    deadline = time.monotonic() + VISIBLE_WITHIN
    while True:
        with suppress(FileNotFoundError):
            if name in os.listdir(run):
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"run = {run} is not the same folder on {socket.gethostname()} and on {host}, where rank 0 runs: name a folder "
                "on a file system that all nodes share"
            )
        time.sleep(0.1)
