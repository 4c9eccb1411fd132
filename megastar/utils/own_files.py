"""Files that only this user can have written, in folders that others may share."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from megastar.errors import UserError


def own_folder(folder: str | Path) -> Path:
    """``folder`` if only this user may write to it, otherwise ``megastar-UID`` in it (empty: in the temporary directory).

    Creates the folder. Raises ``UserError`` for a folder or link of another user, ``OSError`` if creation fails.
    """
    path = Path(folder or tempfile.gettempdir())
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        raise UserError(f"{path} is a symbolic link of another user: name a folder of your own")
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if folder and _is_private(path.stat()):
        return path
    own = path / f"megastar-{os.geteuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(own.lstat()):
        raise UserError(
            f"{own} is a link, belongs to another user, or others may write to it: remove it, or name a folder of your own"
        )
    return own


def _is_private(s: os.stat_result) -> bool:
    return stat.S_ISDIR(s.st_mode) and s.st_uid == os.geteuid() and not s.st_mode & 0o022


def open_own(path: Path, flags: int = os.O_RDONLY, mode: int = 0o644) -> BinaryIO:
    """Open a regular file of this user. Raises ``OSError``, ``PermissionError`` for a link or another user's file."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)  # a pipe would block
    except OSError as error:
        if path.is_symlink():
            raise PermissionError(0, "is a symbolic link", str(path)) from error
        raise
    s = os.fstat(fd)
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    if not stat.S_ISREG(s.st_mode) or s.st_uid != os.geteuid() or (writable and s.st_nlink > 1):
        os.close(fd)
        raise PermissionError(0, "is not a file of this user alone", str(path))
    return os.fdopen(fd, "r+b" if writable else "rb", 0 if writable else -1)
