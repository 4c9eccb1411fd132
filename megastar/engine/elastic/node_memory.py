"""The folder in a node's memory where its ranks keep checkpoints. It belongs to the node's agent, so it outlives the ranks.

/dev/shm/megastar-UID-RUN-xxxxxxxx/lock                     held by the agent as long as it runs
/dev/shm/megastar-UID-RUN-xxxxxxxx/step-00000040-3f2a9c01/  state-*, random-*, rank-*.json: of its ranks and of their peers
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
VARIABLE = "MEGASTAR_MEMORY"  # the folder, for the ranks
STARTUP = 60.0  # seconds that a new folder may lack its lock


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
    """Remove this user's folders, of any run, whose agent is gone: a lock holds in containers too, a process's number not."""
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
