"""Process exit of a rank."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

PATIENCE = 10.0  # seconds to wait for non-daemon threads
AGENT = "MEGASTAR_AGENT"  # process id of the elastic agent that started this rank
PR_SET_PDEATHSIG = 1


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Exit with the status of ``main``, or print its exception and exit with 1, as Python does."""
    try:
        status: Any = main()
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if is_rank():
        leave(status)
    sys.exit(status)


def is_rank() -> bool:
    """Whether this process has a process group, and with it C++ threads unknown to Python."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)  # none while torch is being imported
    return dist is not None and dist.is_available() and dist.is_initialized()


def leave(status: Any) -> NoReturn:
    """Run Python's exit handlers, then exit without finalizing the interpreter.

    A gloo thread releases a collective's tensors after the collective has finished, which needs the GIL. If the
    interpreter is being finalized by then, acquiring the GIL ends the thread inside C++, and the process aborts with
    "terminate called without an active exception" instead of its status (about one in seven exits right after a
    collective). ``destroy_process_group`` helps only if nothing else references the group, but DeepSpeed does.
    """
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    try:
        # Upload threads may be writing a file; but the launcher kills this rank if the others have exited long ago.
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
    """Shut down executors and join non-daemon threads. (``threading._shutdown`` does this too, but only in the main
    thread and without a timeout.)"""
    for call in reversed(getattr(threading, "_threading_atexits", [])):
        call()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def die_with_agent() -> None:
    """End a rank of an elastic agent when the agent is killed: the other nodes restart without both."""
    if agent := os.environ.get(AGENT):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(agent):
            os._exit(1)
