"""The run folder of a tokenizer's training: held by rank 0, and never that of another kind of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megastar.config.files import read_yaml
from megastar.engine.context import Context
from megastar.engine.rank_sync import run_on_main
from megastar.errors import UserError
from megastar.run_dir.events import append_event
from megastar.run_dir.layout import CHECKPOINTS, CONFIG
from megastar.run_dir.lease import RunLease
from megastar.run_dir.tokenizer_run import STATE as STATE
from megastar.run_dir.tokenizer_run import is_tokenizer_run
from megastar.utils.files import check_output
from megastar.utils.signals import StopFlag

RESULT, SCORES = "tokenizer.safetensors", "scores.json"


@contextmanager
def hold_out_folder(out: Path, ctx: Context, stop: StopFlag) -> Iterator[RunLease]:
    """Hold the lease of ``out`` on rank 0 in the block. Raises ``UserError`` on all ranks if another process holds it, it
    cannot be written, or it belongs to another kind of run. A stop signal ends the wait for a holder."""
    run_on_main(ctx, lambda: check_kind(out))
    lease = RunLease(out, "megastar train-tokenizer", "out")
    try:
        run_on_main(ctx, lambda: lease.acquire(lambda: bool(stop.signal)))
        if lease.taken_over:
            append_event(out, "warning", 0, lease.taken_over)
        yield lease
    finally:
        lease.release()


def check_kind(out: Path) -> None:
    """Raises ``UserError`` if ``out`` holds another kind of run, which `megastar train` would not resume afterwards, or if a
    result cannot be written."""
    if (out / CHECKPOINTS).exists():
        raise UserError(f"out = {out} holds the checkpoints of a `megastar train` run: choose another out=...")
    for name in (STATE, RESULT, SCORES):  # written at the end, or after hours
        check_output(out / name, f"the {name} of out =")
    path = out / CONFIG
    if path.is_file() and not is_tokenizer_run(read_yaml(path, lenient=True)):
        raise UserError(
            f"out = {out} holds another kind of run ({path.name} has no field pictures): choose another out=..."
        )
