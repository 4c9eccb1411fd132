"""What a run that ends by a fault leaves behind: stacks/, lost.jsonl, a sentence on stderr."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastar.run_dir.layout import LOST, STACKS
from megastar.utils.clock import utc_now
from megastar.utils.files import append_line
from megastar.utils.hostname import host_name
from megastar.utils.printable import one_entry

REASONS = ("lost", "hung", "corrupt")
COLLECTIVES = 8  # newest ones listed in a stacks file


def record_lost_rank(run: Path, rank: int, host: str, why: str) -> None:
    """Append to lost.jsonl, which the batch script reads to exclude a bad host when it requeues. Never raises.

    {"time": "2026-01-31T12:00:00+00:00", "job": "417", "attempt": 0, "rank": 3, "host": "node7", "why": "lost"}
    """
    assert why in REASONS, why
    job, attempt = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    row = {"time": utc_now(), "job": job, "attempt": attempt, "rank": rank, "host": host, "why": why}
    with suppress(OSError):
        append_line(run / LOST, json.dumps(row))


def write_stacks(run: Path, rank: int, text: str, error: BaseException | None = None) -> Path | None:
    """Write ``text``, the Python stacks of all threads of this process, and the last collectives.

    Works while the main thread is blocked in C. None where the disk refuses the file.
    """
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = run / STACKS / f"rank-{rank:05d}-{now}.txt"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as f:
            f.write(f"{text}\nrank {rank}, pid {os.getpid()}, host {host_name()}, {now}\n")
            if error is not None:
                f.write("\n" + "".join(traceback.format_exception(error)))
            f.write("\nThreads\n")
            for thread in threading.enumerate():
                f.write(f"  0x{thread.ident or 0:016x} {thread.name}\n")
            f.write("\nStacks, the innermost call first\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)
            f.write("\nThe last collectives, the newest last\n")
            f.flush()  # the flight recorder below may itself hang
            f.writelines(f"  {line}\n" for line in last_collectives())
        return path
    return None


def last_collectives() -> list[str]:
    """This rank's newest entries in torch's flight recorder, for NCCL and gloo."""
    recorder = torch._C._distributed_c10d if dist.is_available() else None
    # With NCCL there are two recorders, and the general one may hold gloo's collectives alone.
    dumps = [getattr(recorder, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")]
    if not any(dumps):
        return ["this torch has no flight recorder"]
    entries: list[dict[str, Any]] = []
    try:
        for dump in filter(None, dumps):
            entries = entries or json.loads(dump()).get("entries") or []
    except Exception as error:  # it is private: an error must not lose the rest of the file
        return [f"the flight recorder cannot be read ({type(error).__name__}: {error})"]
    return [_line_of(e) for e in entries[-COLLECTIVES:]] or ["no collectives recorded"]


def _line_of(entry: dict[str, Any]) -> str:
    state = "done" if entry.get("retired") or entry.get("state") == "completed" else entry.get("state")
    group = " ".join(str(x) for x in entry.get("process_group", ()))
    sizes = f"{entry.get('input_sizes')} -> {entry.get('output_sizes')}"
    return f"{entry.get('collective_seq_id')} {entry.get('profiling_name')} {sizes} group {group}: {state}"


def collectives_entered() -> int:
    """How many collectives this rank has entered, over all its groups: the rank with the fewest is behind."""
    try:
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except Exception:  # no process group, a group without numbers, or another version of torch
        return 0


def print_error(text: str) -> None:
    """On stderr, even while the main thread is blocked; the cursor that a progress bar hides is shown again."""
    with suppress(OSError):
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        os.write(2, f"{show_cursor}megastar: error: {one_entry(text)}\n".encode(encoding, "backslashreplace"))
