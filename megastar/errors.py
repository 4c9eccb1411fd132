"""The one exception that means "the user can fix this": printed as a sentence, without a traceback."""

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input: the message says what is wrong, the value, and what to do. ``reported``: by another rank."""

    def __init__(self, *message: object, reported: bool = False):
        super().__init__(*message)
        self.reported = reported


class MissingRanks(Exception):
    """Ranks that never joined: reported as a sentence (empty: another rank reports it), and the job may be requeued."""


def as_user_error(error: BaseException | None) -> UserError | None:
    """The sentence for an ``OSError`` that the user can correct, else None: a disk that fails, as with EIO or ESTALE, may
    recover, and the job is requeued."""
    if not isinstance(error, OSError):
        return None
    path, number = error.filename, error.errno
    if number in (errno.EACCES, errno.EROFS, errno.EISDIR) or (number in (errno.EPERM, errno.ENAMETOOLONG) and path):
        remedy = "change its permissions"
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space"
    elif number in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP) and _is_blocked(path):
        remedy = "remove what is there"
    else:
        return None
    return UserError(f"cannot access{f' {path}' if path else ''} ({error.strerror}): {remedy} or name another place")


def _is_blocked(path: object) -> bool:
    """Whether a file, or a link that leads nowhere, is where a folder has to be: no race of several processes."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    there = Path(os.fsdecode(path))
    return any(os.path.lexists(p) and not os.path.isdir(p) for p in (there, *there.parents))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest of the known names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
