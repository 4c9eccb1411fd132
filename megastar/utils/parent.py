"""The launcher of this rank: whether it has ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megastar.utils.launcher import LAUNCHED_BY_US

POLL = 1.0  # seconds


def end_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Send this process SIGTERM when the launcher that started it has ended: nobody else would end the run.

    Only a Python process is taken for a launcher: a shell that started ranks in the background may end before them.
    """
    parent = os.getppid()
    words = _words(parent)
    is_python = bool(words) and Path(words[0]).name.startswith("python")
    # The launcher may have ended while Python started here. Those of torchrun and deepspeed do not pass on their number,
    # but a child of theirs never has another process 1 for a parent.
    theirs = "TORCHELASTIC_RUN_ID" in environ or "CROSS_RANK" in environ
    if environ.get(LAUNCHED_BY_US, str(parent)) != str(parent) or (theirs and parent == 1 and not is_python):
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if not is_python:
        return
    # The deepspeed command starts this module, which starts the ranks and does not notice that the command ends.
    above = _ppid(parent) if "deepspeed.launcher.launch" in words else 0
    if not _is_deepspeed(above):
        # The command, which gives this option, has ended already; or another program started the module.
        above = -1 if above == 1 and any(word.startswith("--enable_each_rank_log=") for word in words) else 0

    def watch() -> None:
        while os.getppid() == parent and (not above or _ppid(parent) == above):
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _is_deepspeed(pid: int) -> bool:
    return any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in _words(pid))


def _stat(pid: int) -> list[str]:
    """State, parent and further fields of a process; empty where there is no such process, or no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _ppid(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []
