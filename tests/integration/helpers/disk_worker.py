"""Run by torchrun on two ranks from test_disks.py: one run after the other on a small disk that fills, with a slow rank.

DISK and OTHER are disks of their own; what the runs leave is copied to OUT.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megastar.config.load import load_config
from megastar.engine import trainer
from megastar.engine.checkpointer import async_saver as saver_module
from megastar.errors import UserError
from tests.disks import fill
from tests.dist.workers.engine_worker import forget_mesh
from tests.integration.test_disks import BAD, FREE, FULL, SLOW, STEPS

MAIN = os.environ["RANK"] == "0"
config, disk, other, out = (Path(word) for word in sys.argv[1:])
losses, folder_of = trainer.losses, saver_module.folder_of
fillers: list[Path] = []


def free() -> None:
    while fillers:
        fillers.pop().unlink()


def run(name: str, what: dict[str, Any], at_step: Any) -> None:
    """Train; ``at_step`` is called before each step. What was raised, and the run folder, go to OUT / name."""

    def wrapped(cfg: Any, engines: Any, ctx: Any, batch: Any, step: int, **more: Any) -> Any:
        at_step(step)
        began = time.thread_time()
        found, parts = losses(cfg, engines, ctx, batch, step, **more)
        if name == "back" and batch["step"] in BAD:
            found = found * float("nan")
        if not MAIN and name == "freed" and step < SLOW:
            until = time.thread_time() + 3 * (time.thread_time() - began)
            while time.thread_time() < until:  # busy: who sleeps in a collective is not slow
                pass
        return found, parts

    trainer.losses = wrapped
    forget_mesh()
    cfg = load_config(config, [f"run={disk / 'run'}", *(f"{k}={v}" for k, v in what.items())])
    raised = ""
    try:
        trainer.train(cfg)
    except UserError as error:
        raised = str(error)
    except SystemExit as leaving:
        raised = f"status {leaving.code}"
    if MAIN:
        free()
        shutil.copytree(disk / "run", out / name)
        (out / name / "raised.json").write_text(json.dumps(raised))


def wait_for_save() -> None:
    """In the background the last checkpoint is written, and then an older one removed."""
    for thread in threading.enumerate():
        if thread.name == "save":
            thread.join(60)


def fills_and_is_freed(step: int) -> None:
    if MAIN and step == FULL:
        wait_for_save()
        fillers.append(fill(disk))
    elif MAIN and step == FREE:
        free()


def stays_full(step: int) -> None:
    if MAIN and step == STEPS + 1:
        fillers.append(fill(disk))


def stays_full_and_a_signal_comes(step: int) -> None:
    stays_full(step)
    if MAIN and step == STEPS + 3:  # the last one
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()


class Frees(logging.StreamHandler):
    """Frees the disk when the run logs that it retries."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if "; retrying for" in record.getMessage():
            free()


def is_full_when_it_goes_back(step: int) -> None:
    if MAIN and step == BAD[-1]:
        wait_for_save()
        fillers.append(fill(disk))
        logging.getLogger("megastar.engine.rank_sync").addHandler(Frees())


if __name__ == "__main__":
    saver_module.RETRY_EVERY = 0.05
    run("freed", {"train.steps": STEPS, "faults.slow_ratio": 2}, fills_and_is_freed)
    run("full", {"train.steps": STEPS + 4, "faults.save_patience": 1}, stays_full)
    run("signalled", {"train.steps": STEPS + 4}, stays_full_and_a_signal_comes)
    # Rank 1 writes to a disk of its own, and that is full.
    fill(other)
    saver_module.folder_of = lambda cfg: folder_of(cfg) if MAIN else other
    run("one_rank", {"train.steps": STEPS + 4, "faults.save_patience": 1}, lambda step: None)
    saver_module.folder_of = folder_of
    run("resumed", {"train.steps": STEPS + 4}, lambda step: None)
    what = {"spike_window": 8, "max_skips": 2}
    run("back", {"train.steps": STEPS + 12} | {f"faults.{k}": v for k, v in what.items()}, is_full_when_it_goes_back)
