"""Common code of the benchmarks: starting ranks, a configuration by size, and a table of medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def relaunch(ranks: int) -> None:
    """Run this script again under torchrun; returns in the ranks, exits in the launching process."""
    if "RANK" in os.environ:
        return
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *sys.argv]
    raise SystemExit(subprocess.run(command, env=environment).returncode)


def run_config(size: str, *overrides: str):
    """The ST-AR run of this size in configs/run (``nano``: the demo), in fp32, with overrides."""
    from megastar.config.load import load_config

    base = {"xxl": "star_xxl", "3b": "star_3b", "nano": "demo"}.get(size, f"star_{size}_50ep")
    return load_config(ROOT / f"configs/run/{base}.yaml", ["train.dtype=fp32", *overrides])


def random_batch(cfg, ctx, step: int = 0) -> dict:
    import torch

    images = cfg.train.global_batch // ctx.mesh.data
    g = torch.Generator().manual_seed(1000 * step + ctx.mesh.data_rank)
    batch = {
        "codes": torch.randint(0, cfg.model.vocab_size, (images, cfg.views, cfg.model.image_tokens), generator=g),
        "labels": torch.randint(0, cfg.model.num_classes, (images,), generator=g),
        "ids": torch.arange(images),
        "epochs": torch.zeros(images, dtype=torch.int64),
    }
    return batch | {"true_labels": batch["labels"]}


def seconds(
    work: Callable[[], object],
    repeats: int,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Seconds of each of ``repeats`` calls of ``work``, including its work on a GPU; ``before`` is not timed.

    With ``clock`` ``time.process_time``, for one process on one CPU thread, other load has little effect.
    """
    import torch

    out = []
    for _ in range(repeats):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        out.append(clock() - start)
    return out


def report(title: str, rows: dict[str, list[float]], peer: str) -> None:
    """Print the median seconds of each row, and those of the row ``peer`` divided by them."""
    base = statistics.median(rows[peer])
    print(title)
    for name, times in rows.items():
        m = statistics.median(times)
        print(f"  {name:<44} {m:9.4f} s  ({min(times):.4f} to {max(times):.4f})   {peer} / this = {base / m:.2f}")
