"""How a process that was a rank ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

PATIENCE = 10.0  # seconds for threads that are no daemons


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """End this process with ``main``'s status, or with what it raised, as Python would."""
    try:
        status: Any = main()
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if is_rank():
        leave(status)
    sys.exit(status)


def is_rank() -> bool:
    """Whether a process group lives in this process, and with it threads of C++ that Python does not know."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def leave(status: Any) -> NoReturn:
    """What Python does at its end, up to taking itself down.

    A thread of gloo gives a collective's tensors back after the collective is over, and takes Python's lock for it.
    Where Python was being taken down by then, the lock ends the thread inside C++, and the process aborts with
    "terminate called without an active exception" in place of its status: one of some seven that leave right after a
    collective. ``destroy_process_group`` helps only where nothing else holds a group, and DeepSpeed does.
    """
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    try:
        # Workers of an upload may have a file in hand; where the others left long ago a launcher kills this rank.
        finisher = threading.Thread(target=finish_threads, daemon=True)
        finisher.start()
        finisher.join(PATIENCE)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(status & 0xFF)


def finish_threads() -> None:
    """Tell executors that the end has come, wait for threads that are no daemons. (``threading._shutdown`` does this too,
    but it can be called by the main thread only, and waits without end.)"""
    for call in reversed(getattr(threading, "_threading_atexits", [])):
        call()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
