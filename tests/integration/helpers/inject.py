"""`megastar` with faults that the test asks for; started by torchrun from test_faults.py.

    inject.py FAULTS train CONFIG section.field=value ...      FAULTS: JSON, {"nan": {"5": 1}, "spike": [14], "kill": 30}

nan: places in the data's order (batches) -> the rank whose loss is not a number there; -1: every rank's.
spike: places whose losses are ten times as high. kill: the place at which rank 0 is killed.
corrupt: the place at which a bit of a weight flips on rank 1. signal: the place at which rank 1 is asked to stop.
Several runs of one process are separated by the word "--", each with FAULTS of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

import megastar.engine.trainer as loop
from megastar.cli import main
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.utils.process_exit import leave

plain = loop.losses
faults: dict = {}


def losses(cfg, engines, ctx, batch, step, **more):
    place = batch["step"]
    if faults.get("kill") == place and ctx.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if faults.get("signal") == place and ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    loss, parts = plain(cfg, engines, ctx, batch, step, **more)
    if faults.get("corrupt") == place and ctx.rank == 1:
        engines.student.module.transformer.norm.weight.data.view(torch.int32)[5] ^= 1 << 20
    whose = faults.get("nan", {}).get(str(place))
    factor = float("nan") if whose in (-1, ctx.rank) else 10.0 if place in faults.get("spike", []) else 1.0
    return loss * factor, {name: value * factor for name, value in parts.items()}


loop.losses = losses
words = sys.argv[1:]
while words:
    end = words.index("--") if "--" in words else len(words)
    faults = json.loads(words[0])
    try:
        status = main(words[1:end])
    except SystemExit as leaving:  # stopped
        status = leaving.code
    except CorruptReplica as error:
        print("CorruptReplica:", error, flush=True)
    words = words[end + 1 :]
leave(status)
