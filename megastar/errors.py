"""The one exception that means "the user can fix this": printed as a sentence, without a traceback."""

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says what is wrong, the value, and what to do. ``reported``: by another rank."""

    def __init__(self, *message: object, reported: bool = False):
        super().__init__(*message)
        self.reported = reported


class MissingRanks(Exception):
    """Ranks that never joined: reported as a sentence (empty: another rank reports it), and the job may be requeued."""


def as_user_error(error: BaseException | None) -> UserError | None:
    """The sentence for an ``OSError`` that the user can fix, else None."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR)
    paths = (
        errno.EEXIST,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )  # a file or dangling link instead of a folder
    if not isinstance(error, OSError) or error.errno not in numbers + paths:
        return None
    where = f" {error.filename}" if error.filename else ""
    return UserError(f"cannot write{where} ({error.strerror}): free space or name another place")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest of the known names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
