"""The one exception that means "the user can fix this": printed as a sentence, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message says what is wrong, the value, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the nearest of the known names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
