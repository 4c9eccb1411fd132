"""Values and decisions that are the same on all ranks. Every function but ``wait_for`` is a collective.

Ranks exchange JSON in tensors, never pickles: tuples arrive as lists, on one rank too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.context import Context
from megastar.engine.phase import PHASE, SAVING
from megastar.errors import UserError, as_user_error
from megastar.parallel.signed_store import SignedStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 3600.0  # seconds that ranks wait for each other's files


def from_main(ctx: Context, value: T) -> T:
    """The main rank's ``value``, which JSON can represent, on all ranks."""
    data = _encode(ctx, value)
    if ctx.world > 1:
        length = torch.tensor([len(data)], device=ctx.device)
        dist.broadcast(length, src=0)
        data = data if ctx.main else data.new_empty(int(length.item()))
        dist.broadcast(data, src=0)
    return cast(T, _decode(data))


def gather(ctx: Context, value: T) -> list[T]:
    """The ``value`` of each rank, which JSON can represent, on all ranks."""
    data = _encode(ctx, value)
    if ctx.world == 1:
        return [cast(T, _decode(data))]
    lengths = [torch.zeros(1, dtype=torch.int64, device=ctx.device) for _ in range(ctx.world)]
    dist.all_gather(lengths, torch.tensor([len(data)], device=ctx.device))
    counts = [int(n.item()) for n in lengths]
    padded = torch.nn.functional.pad(data, (0, max(counts) - len(data)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [cast(T, _decode(part[:count])) for part, count in zip(parts, counts, strict=True)]


def _encode(ctx: Context, value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(ctx.device)


def _decode(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def on_main(ctx: Context, work: Callable[[], None]) -> str:
    """Run ``work`` on rank 0. Returns the message of its ``OSError``, or the empty string, on all ranks."""
    problem = ""
    if ctx.main:
        try:
            work()
        except OSError as error:
            problem = str(error)
    return from_main(ctx, problem)


def retry(ctx: Context, attempt: Callable[[], str], patience: float, stop: Callable[[], bool] = lambda: False) -> str:
    """Call ``attempt`` on all ranks until it returns no problem, for ``patience`` seconds, at least once.

    Returns the last problem, or the empty string. ``stop``, called on the main rank, ends the retries.
    """
    until, pause = time.monotonic() + patience, 1.0
    while True:
        PHASE.at(SAVING)  # the watchdog's limit starts anew with each attempt
        problem, left = attempt(), until - time.monotonic()
        if not problem or not from_main(ctx, left > 0 and not stop()):
            return problem
        if ctx.main and pause == 1.0:
            logger.warning("%s; retrying for %.0f s", problem, left)
        time.sleep(max(0.0, min(pause, left)))
        pause = min(2 * pause, 10.0)


def wait_for(store: SignedStore, key: str, otherwise: str, patience: float = PATIENCE) -> str:
    """The value of ``key`` once some rank has set it. Polls: a blocking wait would hold the store for every thread."""
    deadline = time.monotonic() + patience
    while not (store.check([key]) and (found := store.get_all([key]))):
        if time.monotonic() > deadline:
            raise OSError(f"{otherwise} within {patience:.0f} s")
        time.sleep(0.02)
    return found[key].decode()


def on_all_ranks(ctx: Context, make: Callable[[], T]) -> T:
    """The result of ``make``. If it fails on some rank it fails on all, so that none waits in a collective."""
    try:
        made, error = make(), None
    except Exception as failure:
        made, error = None, failure
    if (error := error_of_any_rank(ctx, error)) is not None:
        raise error
    return cast(T, made)


def error_of_any_rank(ctx: Context, error: Exception | None) -> Exception | None:
    """This rank's own error, or else that of the first rank that has one. Called by all ranks alike.

    A ``UserError`` of one rank is a ``UserError`` on the other ranks too, which do not report it again. Any other error
    is a ``RuntimeError`` on the other ranks, and the job is requeued.
    """
    error = as_user_error(error) or error
    is_user_error = isinstance(error, UserError)
    every = gather(ctx, (f"{error}" if is_user_error else repr(error) if error else "", is_user_error))
    if error is not None:
        return error
    for rank, (text, user) in enumerate(every):
        if text:
            return UserError(text, reported=True) if user else RuntimeError(f"rank {rank}: {text}")
    return None


def run_on_main(ctx: Context, work: Callable[[], T]) -> T:
    """The result of ``work`` on rank 0, on all ranks; if it fails it fails on all."""
    return cast(T, from_main(ctx, on_all_ranks(ctx, lambda: work() if ctx.main else None)))
