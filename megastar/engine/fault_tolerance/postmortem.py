"""What a run that ends by a fault leaves behind: stacks/, lost.jsonl, one sentence."""

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

WHY = ("lost", "hung", "corrupt")
COLLECTIVES = 8  # of the last ones, in a stacks file


def record_lost_rank(run: Path, rank: int, host: str, why: str) -> None:
    """Append to lost.jsonl, which the batch script reads to keep a requeued job away from a bad host. Never raises.

    {"time": "2026-01-31T12:00:00+00:00", "job": "417", "attempt": 0, "rank": 3, "host": "node7", "why": "lost"}
    """
    assert why in WHY, why
    line = {
        "time": utc_now(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "rank": rank,
        "host": host,
        "why": why,
    }
    with suppress(OSError):
        append_line(run / LOST, json.dumps(line))


def write_stacks(run: Path, rank: int, text: str, error: BaseException | None = None) -> Path | None:
    """The Python stacks of all threads of this process, ``text`` above them, the last collectives below.

    Works while the main thread sits in C. None where the disk takes no file.
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
            f.flush()  # what comes now asks a library that may hang itself
            f.writelines(f"  {line}\n" for line in last_collectives())
        return path
    return None


def last_collectives() -> list[str]:
    """What torch's flight recorder holds of this rank, for NCCL and gloo."""
    recorder = torch._C._distributed_c10d if dist.is_available() else None
    # With NCCL there are two records, and the general one may hold gloo's collectives alone.
    dumps = [getattr(recorder, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")]
    if not any(dumps):
        return ["this torch has no flight recorder"]
    try:
        entries = next((e for dump in dumps if dump and (e := json.loads(dump()).get("entries"))), [])
    except Exception as error:  # a private function of torch: not a reason to lose the rest
        return [f"the flight recorder cannot be read ({type(error).__name__}: {error})"]
    return [_line_of(e) for e in entries[-COLLECTIVES:]] or ["none on record"]


def _line_of(entry: dict[str, Any]) -> str:
    state = "done" if entry.get("retired") or entry.get("state") == "completed" else entry.get("state")
    group = " ".join(str(x) for x in entry.get("process_group", ()))
    sizes = f"{entry.get('input_sizes')} -> {entry.get('output_sizes')}"
    return f"{entry.get('collective_seq_id')} {entry.get('profiling_name')} {sizes} group {group}: {state}"


def collectives_entered() -> int:
    """How many collectives this rank has entered, over all its groups: the rank with the fewest is behind."""
    try:
        groups = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except Exception:  # no process group, a group without numbers, or a torch that keeps them elsewhere
        return 0


def print_error(text: str) -> None:
    """On stderr, whatever the main thread holds; the cursor that a progress bar hides comes back."""
    with suppress(OSError):
        hidden = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        os.write(2, f"{hidden}megastar: error: {text}\n".encode())
