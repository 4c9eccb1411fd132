"""The run folder of a training: held by rank 0, with one configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.rank_sync import run_on_main
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import append_event
from megastar.run_dir.lease import RunLease
from megastar.utils.files import check_output
from megastar.utils.signals import StopFlag


@contextmanager
def hold_run_folder(cfg: RunConfig, ctx: Context, stop: StopFlag) -> Iterator[RunLease]:
    """Hold the run folder's lease on rank 0 in the block. Raises ``UserError`` on all ranks if another process holds it,
    or the folder cannot be created or written. A stop signal ends the wait for a holder that may have ended."""
    run = Path(cfg.run)
    lease = RunLease(run, "megastar train", "run")
    try:
        run_on_main(ctx, lambda: check_output(run, "run =", folder=True))
        run_on_main(ctx, lambda: lease.acquire(lambda: bool(stop.signal)))
        if lease.taken_over:
            found = checkpoint_dir.latest(checkpoint_dir.folder_of(run))
            append_event(run, "warning", checkpoint_dir.step_in(found) if found else 0, lease.taken_over)
        yield lease
    finally:
        lease.release()
