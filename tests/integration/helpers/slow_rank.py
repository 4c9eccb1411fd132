"""`megastar train CONFIG` whose last rank falls asleep in the middle of a step. Run from test_watchdog.py."""

from __future__ import annotations

import os
import sys
import time

from megastar import cli
from megastar.engine import trainer

STEP = 8


def asleep_for_ever() -> None:
    time.sleep(10_000)


def set_schedules(cfg, engines, step, steps, inner=trainer.set_schedules) -> None:
    if step + 1 == STEP and os.environ["RANK"] == "1":
        asleep_for_ever()
    inner(cfg, engines, step, steps)


if __name__ == "__main__":
    trainer.set_schedules = set_schedules
    cli.program(["train", *sys.argv[1:]])
