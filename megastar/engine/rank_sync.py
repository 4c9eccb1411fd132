"""Decisions that all ranks take alike. Every function but ``wait_for`` is a collective."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megastar.engine.context import Context
from megastar.engine.phase import PHASE, SAVING
from megastar.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
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


def retry(ctx: Context, attempt: Callable[[], str], patience: float, stop: Callable[[], bool] = lambda: False) -> str:
    """Call ``attempt`` on all ranks until it returns no problem, for ``patience`` seconds, at least once.

    Returns the last problem, or the empty string. ``stop``, asked on the main rank, ends the retries.
    """
    until, pause = time.monotonic() + patience, 1.0
    while True:
        PHASE.at(SAVING)  # the watchdog's limit starts anew with each attempt
        problem, left = attempt(), until - time.monotonic()
        if not problem or not agreed(ctx, left > 0 and not stop()):
            return problem
        if ctx.main and pause == 1.0:
            logger.warning("%s; retrying for %.0f s", problem, left)
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


def on_all_ranks(ctx: Context, make: Callable[[], T]) -> T:
    """The result of ``make``. Where it fails on some rank it fails on all: none is left behind in a collective."""
    try:
        made, error = make(), None
    except Exception as failure:
        made, error = None, failure
    if (error := error_of_any_rank(ctx, error)) is not None:
        raise error
    return cast(T, made)


def error_of_any_rank(ctx: Context, error: Exception | None) -> Exception | None:
    """This rank's own error, or else the first rank's that has one, with its message. Called by all ranks alike.

    It is a ``UserError`` on the other ranks too only where it was one: what no user can fix is requeued.
    """
    is_user_error = isinstance(error, UserError)
    mine = (f"{error}" if is_user_error else repr(error) if error else "", is_user_error)
    every = [mine]
    if ctx.world > 1:
        every = [("", False)] * ctx.world
        dist.all_gather_object(every, mine)
    if error is not None:
        return error
    return next(
        (UserError(t) if user else RuntimeError(f"rank {r}: {t}") for r, (t, user) in enumerate(every) if t), None
    )


def run_on_main(ctx: Context, work: Callable[[], T]) -> T:
    """The result of ``work`` on rank 0, on all ranks; where it fails it fails on all."""
    result = [on_all_ranks(ctx, lambda: work() if ctx.main else None)]
    if ctx.world > 1:
        dist.broadcast_object_list(result, src=0, device=ctx.device)
    return cast(T, result[0])
