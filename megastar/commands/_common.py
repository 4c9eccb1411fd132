"""What the commands share: parsers that raise one sentence, the launcher's environment, overrides."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from megastar.errors import UserError


class Parser(argparse.ArgumentParser):
    """``megastar <command>``'s parser: wrong usage is a ``UserError``, the examples keep their lines."""

    def __init__(self, command: str, description: str, examples: str, fields: str = ""):
        epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
        super().__init__(
            prog=f"megastar {command}",
            description=description,
            epilog=epilog + (f"\n\nfields (name, default, meaning):\n{fields}" if fields else ""),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=terminal_width()),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def terminal_width() -> int:
    return max(80, min(140, shutil.get_terminal_size((110, 24)).columns))


def config_and_overrides(items: list[str]) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] a.b=c ...``. Raises ``UserError`` for a second file."""
    files = [i for i in items if "=" not in i]
    if len(files) > 1:
        raise UserError(f"two configurations, {files[0]} and {files[1]}: give one, and fields as section.field=value")
    return (files[0] if files else None), [i for i in items if "=" in i]


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """An argparse type: 0, 1, 2 ..."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 on")
    return int(text)


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


class FaultTolerantStream(io.TextIOBase):
    """A text stream that takes no part in a full disk below it: what cannot be written is lost, or comes later.

    A closed pipe stays an error.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def __getattr__(self, name: str) -> Any:  # encoding, buffer
        return getattr(self.stream, name)


# Launchers ---------------------------------------------------------------------------------------------------------
BY_US = "MEGASTAR_LAUNCHER"  # set for the processes that launch.py starts


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, deepspeed or srun started this process as one of several."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    # A batch script has SLURM_PROCID too; only a step of srun has SLURM_STEP_ID.
    return "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))) > 1


def is_main_process(environ: Mapping[str, str]) -> bool:
    if "RANK" in environ:
        return environ["RANK"] == "0"
    return not is_launched(environ) or environ.get("SLURM_PROCID", "0") == "0"


def place_of(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) as torchrun, deepspeed or srun say; (0, 1, 0) without a launcher."""
    if not is_launched(environ):
        return 0, 1, 0
    if "RANK" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0"))
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    return int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", "0"))


def tell(message: str, environ: Mapping[str, str]) -> None:
    """Say a user's mistake once: the main rank prints it; below our launcher, which prints for all, no rank does.

    The others leave the sentence where torch's launchers look for it, and print it where there is no such place.
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if path and (not is_main_process(environ) or BY_US in environ):
        try:
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
            return
        except OSError:  # a full disk
            pass
    print(f"megastar: error: {message}", file=sys.stderr)
