"""Logging for the command line: time, level and rank on each line, through the console of the progress bars."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from megastar.errors import UserError
from megastar.utils.console import PlainConsole
from megastar.utils.printable import one_entry
from megastar.utils.redact import redact

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
VARIABLE = "MEGASTAR_LOG_LEVEL"
ROOT = logging.getLogger("megastar")


class EntryFormatter(logging.Formatter):
    """A record is one entry: a value in it cannot begin a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_entry(super().formatMessage(record))


class ConsoleHandler(logging.Handler):
    """Prints through a rich console, so that lines appear above a progress bar."""

    def __init__(self, console: Console, rank: int | None):
        super().__init__()
        self.console = console
        place = "" if rank is None else f"rank {rank} "
        self.setFormatter(EntryFormatter(f"%(asctime)s %(levelname)s {place}%(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(Text(redact(self.format(record))), soft_wrap=True)
        except Exception:
            self.handleError(record)


def configure_logging(
    level: str = "",
    *,
    console: Console | None = None,
    rank: int | None = None,
    default: str = "INFO",
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Print the package's log records of at least ``level`` (default: $MEGASTAR_LOG_LEVEL, else ``default``).

    ``rank`` is shown on each line; None for a process that is not a rank. A further call replaces the handler. Raises
    ``UserError`` for an unknown level.
    """
    name = (level or environ.get(VARIABLE, "") or default).upper()
    if name not in LEVELS:
        raise UserError(f"{VARIABLE}={name}: unknown log level; choose one of {', '.join(LEVELS)}")
    for handler in [h for h in ROOT.handlers if isinstance(h, ConsoleHandler)]:
        ROOT.removeHandler(handler)
    ROOT.addHandler(ConsoleHandler(console or PlainConsole(), rank))
    ROOT.setLevel(name)
    ROOT.propagate = False  # otherwise an application's root logger prints each line again


def shared_console() -> Console:
    """The console of the installed handler, for progress bars; a new one if logging is not configured."""
    return next((h.console for h in ROOT.handlers if isinstance(h, ConsoleHandler)), None) or PlainConsole()
