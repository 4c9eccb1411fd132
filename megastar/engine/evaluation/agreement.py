"""Work of single ranks during an evaluation: it ends on all ranks alike, whatever happens on one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from megastar.engine.context import Context
from megastar.engine.phase import EVALUATION, PHASE
from megastar.engine.rank_sync import from_main, gather
from megastar.errors import as_user_error

T = TypeVar("T")
TURN = 1.0  # seconds after which the ranks that wait for rank 0 hear from it


class EvaluationEnded(Exception):
    """On all ranks: an evaluation is given up, with a sentence, or because of a stop signal."""

    def __init__(self, text: str, signal: int = 0):
        super().__init__(text)
        self.signal = signal


class Agreement:
    """``stop``: the number of this rank's stop signal, or 0."""

    def __init__(self, ctx: Context, stop: Callable[[], int]):
        self.ctx, self.stop = ctx, stop

    def here(self) -> None:
        """Tell the watchdog that this rank advances, and end its work after a stop signal. Called within ``all``."""
        PHASE.at(EVALUATION)
        if number := self.stop():
            raise EvaluationEnded(f"signal {number}", number)

    def all(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which uses no collective, on each rank. Raises ``EvaluationEnded`` on all ranks alike if it
        failed on one, or one has a stop signal."""
        PHASE.at(EVALUATION)
        made, failure = None, ""
        try:
            made = work()
        except EvaluationEnded:
            pass  # the signal is reported below
        except Exception as error:  # also of libraries: a failing evaluation does not end the run
            failure = sentence_of(error)
        self._agree(failure)
        return cast(T, made)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """The result of ``work`` on rank 0, None on the others. It may take any time: it runs in a thread, and the ranks meet
        every ``TURN`` seconds meanwhile. Raises as ``all``."""
        made: list[T] = []
        failures: list[str] = []

        def run() -> None:
            try:
                if self.ctx.device.type == "cuda":
                    torch.cuda.set_device(self.ctx.device)  # of this thread
                made.append(work())
            except EvaluationEnded:
                pass
            except Exception as error:
                failures.append(sentence_of(error))

        thread = threading.Thread(target=run, name="evaluation", daemon=True)
        if self.ctx.main:
            thread.start()
        working = True
        while working:
            PHASE.at(EVALUATION)
            if self.ctx.main:
                thread.join(TURN)
            working = from_main(self.ctx, thread.is_alive())
        self._agree(failures[0] if failures else "")
        return made[0] if made else None

    def _agree(self, failure: str) -> None:
        every: list[Any] = gather(self.ctx, [failure, self.stop()])
        if number := max(int(n) for _, n in every):
            raise EvaluationEnded(f"signal {number}", number)
        for rank, (text, _) in enumerate(every):
            if text:
                raise EvaluationEnded(text if self.ctx.world == 1 else f"rank {rank}: {text}")


def sentence_of(error: Exception) -> str:
    """One line of an error of any kind."""
    error = as_user_error(error) or error
    text = " ".join(str(error).split())[:500]
    return text or type(error).__name__
