"""The folder in a node's memory for the checkpoints of its ranks. It belongs to the node's agent, so it outlives them.

/dev/shm/megastar-UID-RUN-xxxxxxxx/lock                     held by the agent while it runs
/dev/shm/megastar-UID-RUN-xxxxxxxx/step-00000040-3f2a9c01/  state-*, random-*, rank-*.json: of its ranks and their peers
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
LOCK = "lock"
VARIABLE = "MEGASTAR_MEMORY"  # passes the folder to the ranks
STARTUP = 60.0  # seconds for which a new folder may lack its lock


@contextmanager
def node_memory(run: Path) -> Iterator[Path]:
    """The folder of an agent of ``run`` for its lifetime, which only this user can read."""
    remove_stale()
    name = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]
    folder = Path(tempfile.mkdtemp(prefix=f"megastar-{os.getuid()}-{name}-", dir=MEMORY))
    try:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale() -> None:
    """Remove this user's folders, of any run, whose agent has ended. Unlike process ids, locks work in containers."""
    for folder in MEMORY.glob(f"megastar-{os.getuid()}-*-*"):
        with suppress(OSError):
            found = folder.lstat()
            if folder.is_symlink() or found.st_uid != os.getuid() or not folder.is_dir():
                continue
            if not (folder / LOCK).is_file():
                stale = time.time() - found.st_mtime > STARTUP
            else:
                with (folder / LOCK).open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its agent runs
                stale = True
            if stale:
                shutil.rmtree(folder, ignore_errors=True)
