"""How ranks come to know of each other what they must not decide alone. Collectives, but for ``wait_for``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megastar.engine.progress import PROGRESS, SAVING

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.build import Context

PATIENCE = 3600.0  # seconds that ranks wait for each other's files


def agreed(ctx: Context, yes: bool) -> bool:
    """The main rank's answer, on all ranks."""
    answer = [yes]
    if ctx.world > 1:
        dist.broadcast_object_list(answer, src=0, device=ctx.device)
    return answer[0]


def on_main(ctx: Context, work: Callable[[], None]) -> str:
    """Run ``work`` on rank 0; every rank learns what went wrong on its disk, or the empty string."""
    problem = [""]
    if ctx.main:
        try:
            work()
        except OSError as error:
            problem = [str(error)]
    if ctx.world > 1:
        dist.broadcast_object_list(problem, src=0, device=ctx.device)
    return problem[0]


def on_main_in_time(ctx: Context, work: Callable[[], None], patience: float) -> str:
    """``on_main``, tried again for ``patience`` seconds while the disk does not take it: ``work`` must bear that."""
    until, pause = time.monotonic() + patience, 1.0
    while True:
        PROGRESS.at(SAVING)  # each try has the watchdog's patience anew
        problem, left = on_main(ctx, work), until - time.monotonic()
        if not problem or not agreed(ctx, left > 0):
            return problem
        if ctx.main and pause == 1.0:
            print(f"{problem}; trying for {left:.0f} s more", flush=True)
        time.sleep(max(0.0, min(pause, left)))
        pause = min(2 * pause, 10.0)


def wait_for(store: Any, key: str, otherwise: str, patience: float = PATIENCE) -> str:
    """The value of ``key`` once some rank has set it. Polls: a blocking wait would hold the store for every thread."""
    deadline = time.monotonic() + patience
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise OSError(f"{otherwise} within {patience:.0f} s")
        time.sleep(0.02)
    value: bytes = store.get(key)
    return value.decode()
