"""Foreign text for a terminal or a log: names of files, classes and hosts may contain control characters."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import TextIO

# C0 and C1 controls except tab and newline, surrogates (bytes of a file name that are not UTF-8), and the invisible
# characters that reorder or hide text: bidirectional marks, separators of lines and paragraphs, tags.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_FORGED_LINE = re.compile(r"\n(?! )(?=.)", re.DOTALL)


def printable(text: str) -> str:
    """``text`` with an escape such as ``\\x1b`` or ``\\u202e`` for each character that a terminal acts on or hides."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_entry(text: str) -> str:
    """``printable``, with further lines indented by a space: no value can begin a line of a log or an error."""
    return _FORGED_LINE.sub(r"\\n", printable(text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """``printable``, with escaped newlines and tabs."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def say(text: str, stream: TextIO | None = None) -> None:
    """``print`` of ``printable`` text, whatever the encoding of the stream (default: standard output)."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def tolerate_any_text() -> None:
    """Print characters that the encodings of standard output and error lack as escapes instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a file, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
