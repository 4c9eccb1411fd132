"""Detects that a run folder was removed, moved or replaced while a run writes to it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from megastar.errors import UserError

CHECK_EVERY = 1.0  # seconds


class FolderGuard:
    """Keeps ``folder`` open, so that no new folder gets its inode, and compares it with the folder at its path."""

    def __init__(self, folder: Path):
        self.folder = Path(os.path.abspath(folder))
        self._checked = time.monotonic()
        self._gone = ""
        self._fd = -1
        with suppress(OSError):
            self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def gone(self, now: bool = False) -> str:
        """What happened to the folder; empty: nothing. Checks at most once per second, or ``now``."""
        if self._fd < 0 or self._gone or not (now or time.monotonic() - self._checked >= CHECK_EVERY):
            return self._gone
        self._checked = time.monotonic()
        try:
            there = os.stat(self.folder)
            if not os.path.samestat(there, os.fstat(self._fd)):
                self._gone = "was replaced"
        except (FileNotFoundError, NotADirectoryError):
            self._gone = "was removed or moved"
        except OSError:  # a disk that does not respond: the writes report it
            pass
        return self._gone

    def check(self) -> None:
        """Raise ``UserError`` if the folder is gone."""
        if problem := self.gone(now=True):
            raise UserError(
                f"{self.folder} {problem} while the run writes into it: nothing more can be saved there; put it back, or "
                "start again with another run=..."
            )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
