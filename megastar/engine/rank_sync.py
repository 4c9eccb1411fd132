"""How ranks come to know of each other what they must not decide alone. Collectives, but for ``wait_for``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist

from megastar.engine.phase import PHASE, SAVING
from megastar.errors import UserError

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.engine.context import Context

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


def on_main_with_retry(ctx: Context, work: Callable[[], None], patience: float) -> str:
    """``on_main``, tried again for ``patience`` seconds while the disk does not take it: ``work`` must bear that."""
    until, pause = time.monotonic() + patience, 1.0
    while True:
        PHASE.at(SAVING)  # each try has the watchdog's patience anew
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


T = TypeVar("T")


def on_all_ranks(ctx: Context, make: Callable[[], T]) -> T:
    """What ``make`` returns. Where it fails on some rank it fails on all: none is left behind in a collective."""
    try:
        made, problem = make(), None
    except Exception as error:
        made, problem = None, error
    if (problem := _problem_of_any(ctx, problem)) is not None:
        raise problem
    return cast(T, made)


def _problem_of_any(ctx: Context, problem: Exception | None) -> Exception | None:
    """This rank's own, or else the first rank's that has one, as its sentence. Called by all ranks alike.

    A ``UserError`` on others too only where it was one: what nobody has to mend is requeued.
    """
    mine = isinstance(problem, UserError)
    run_on_main = (f"{problem}" if mine else repr(problem) if problem else "", mine)
    every = [run_on_main]
    if ctx.world > 1:
        every = [("", False)] * ctx.world
        dist.all_gather_object(every, run_on_main)
    if problem is not None:
        return problem
    return next(
        (UserError(t) if user else RuntimeError(f"rank {r}: {t}") for r, (t, user) in enumerate(every) if t), None
    )


T = TypeVar("T")


def run_on_main(ctx: Context, work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on all ranks; where it fails it fails on all."""
    said = [on_all_ranks(ctx, lambda: work() if ctx.main else None)]
    if ctx.world > 1:
        dist.broadcast_object_list(said, src=0, device=ctx.device)
    return cast(T, said[0])
