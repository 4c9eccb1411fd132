"""Shared by the commands: argument parsers, the launcher's environment, overrides, error reports."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from megastar.errors import UserError
from megastar.utils.redact import redact

if TYPE_CHECKING:
    from rich.console import Console


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends each option's default, unless it is empty or the help text has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = f"{action.default:g}" if isinstance(action.default, float) else action.default
        empty = default in (None, "", argparse.SUPPRESS) or default is False
        return action.help if empty or "(default" in (action.help or "") else f"{action.help} (default {default})"


class Parser(argparse.ArgumentParser):
    """The parser of one command: wrong usage raises ``UserError``, examples keep their line breaks."""

    def __init__(self, command: str, description: str, examples: str, fields: str = ""):
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
        super().__init__(
            prog=f"megastar {command}",
            description=textwrap.fill(description, terminal_width()),
            epilog=epilog + (f"\n\nfields (name, default, meaning):\n{fields}" if fields else ""),
            formatter_class=lambda prog: _HelpFormatter(prog, width=terminal_width()),
            allow_abbrev=False,
        )
        level = self.add_argument_group("logging").add_mutually_exclusive_group()
        level.add_argument("-v", "--verbose", action="store_true", help="log debug messages too (level DEBUG)")
        quiet = (
            "log warnings and errors only, show no progress bars (level WARNING); without -v and -q the level is "
            "$MEGASTAR_LOG_LEVEL, one of DEBUG, INFO, WARNING, ERROR (default INFO)"
        )
        level.add_argument("-q", "--quiet", action="store_true", help=quiet)

    def parse(self, words: list[str], console: Console | None = None) -> argparse.Namespace:
        """Parse ``words`` and configure logging to ``console`` (default: standard output, with --json standard error)."""
        from rich.console import Console

        from megastar.utils.logs import configure_logging

        args = self.parse_intermixed_args(words)
        rank = place_of(os.environ)[0] if is_launched(os.environ) else None
        level = "DEBUG" if args.verbose else "WARNING" if args.quiet else ""
        configure_logging(level, console=console or Console(stderr="json" in args and args.json), rank=rank)
        return args

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def terminal_width() -> int:
    return max(80, min(140, shutil.get_terminal_size((110, 24)).columns))


def logging_options() -> list[str]:
    """The options that give another process this process's log level."""
    return {logging.DEBUG: ["--verbose"], logging.WARNING: ["--quiet"]}.get(logging.getLogger("megastar").level, [])


def config_and_overrides(items: list[str]) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] a.b=c ...``. Raises ``UserError`` for a second file."""
    files = [i for i in items if "=" not in i]
    if len(files) > 1:
        raise UserError(f"two configurations, {files[0]} and {files[1]}: give one; write fields as section.field=value")
    return (files[0] if files else None), [i for i in items if "=" in i]


def integer(low: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``low``."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {low}")
        return int(text)

    return parse


positive, natural = integer(1), integer(0)


def seconds(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a time from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {low:g} to {high:g}")
        return value

    return parse


class FaultTolerantStream:
    """A text stream that ignores write errors such as a full disk; the text is lost or written later.

    A closed pipe is still an error.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self._ignoring_errors(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._ignoring_errors(self.stream.flush)

    def _ignoring_errors(self, call: Callable[..., object], *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding, buffer
        return getattr(self.stream, name)


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print ``rows`` under ``title`` to standard output; lines are not wrapped for programs that read them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(_printable(name), _printable(str(value)))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    console.print(title, table, sep="\n")


def _printable(text: str) -> str:
    """Escape control characters, which names in foreign files may contain."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def main_console() -> Console:
    """The shared console, silent on all ranks but the first."""
    from rich.console import Console

    from megastar.utils.logs import shared_console

    return shared_console() if place_of(os.environ)[0] == 0 else Console(quiet=True)


# Launchers ---------------------------------------------------------------------------------------------------------
LAUNCHED_BY_US = "MEGASTAR_LAUNCHER"  # set for processes that _launch.py starts


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, deepspeed or srun started this process as a rank."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    # A batch script has SLURM_PROCID too; only an srun step has SLURM_STEP_ID.
    return "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))) > 1


def place_of(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank) set by torchrun, deepspeed or srun; (0, 1, 0) without a launcher."""
    if not is_launched(environ):
        return 0, 1, 0
    if "RANK" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0"))
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    return int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", "0"))


def own_device(name: str) -> str:
    """Under a launcher, "auto" and "cuda" select the GPU of this process's local rank."""
    import torch

    _, world, local = place_of(os.environ)
    gpus = torch.cuda.device_count()
    return f"cuda:{local % gpus}" if name in ("auto", "cuda") and world > 1 and gpus else name


def report_error(message: str, environ: Mapping[str, str]) -> None:
    """Report a user error once: rank 0 prints it; below our own launcher, which prints it, no rank does.

    Other ranks write it to the error file of torch's launchers, or print it if there is no such file.
    """
    message, path = redact(message), environ.get("TORCHELASTIC_ERROR_FILE")
    if path and (place_of(environ)[0] != 0 or LAUNCHED_BY_US in environ):
        try:
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
            return
        except OSError:  # a full disk
            pass
    print(f"megastar: error: {message}", file=sys.stderr)
