"""Shared by the commands: argument parsers, the launcher's environment, overrides, error reports."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from megastar.config.convert import shown
from megastar.config.knob import MOST_SEED, MOST_THREADS
from megastar.errors import UserError
from megastar.utils.hostname import host_name
from megastar.utils.launcher import LAUNCHED_BY_US, is_launched, place_of
from megastar.utils.printable import one_entry, one_line, say
from megastar.utils.redact import redact

if TYPE_CHECKING:
    from rich.console import Console


T = TypeVar("T", int, float)
SETTINGS = ("is_split", "kid_subsets", "kid_size", "allow_few")  # of a score


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
            "$MEGASTAR_LOG_LEVEL, one of DEBUG, INFO, WARNING, ERROR (default INFO; WARNING on ranks other than 0)"
        )
        level.add_argument("-q", "--quiet", action="store_true", help=quiet)

    def parse(self, words: list[str], console: Console | None = None, every_rank: bool = False) -> argparse.Namespace:
        """Parse ``words`` and configure logging to ``console`` (default: standard output, with --json standard error).

        ``every_rank``: ranks other than 0 log at level INFO too, not only warnings.
        """
        from megastar.utils.console import PlainConsole
        from megastar.utils.logs import configure_logging

        args = self.parse_intermixed_args(words)
        rank = place_of(os.environ)[0] if is_launched(os.environ) else None
        level = "DEBUG" if args.verbose else "WARNING" if args.quiet else ""
        default = "WARNING" if rank and not every_rank else "INFO"
        console = console or PlainConsole(stderr="json" in args and args.json)
        configure_logging(level, console=console, rank=rank, default=default)
        return args

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def terminal_width() -> int:
    return max(80, min(140, shutil.get_terminal_size((110, 24)).columns))


def logging_options() -> list[str]:
    """The options that give another process this process's log level."""
    return {logging.DEBUG: ["--verbose"], logging.WARNING: ["--quiet"]}.get(logging.getLogger("megastar").level, [])


def config_and_overrides(items: list[str]) -> tuple[str | None, list[str]]:
    """Split ``[CONFIG] a.b=c ...``. Raises ``UserError`` for a second file.

    The path of CONFIG may contain ``=``: a field name contains no slash, and an existing file is not an override.
    """
    files = [i for i in items if "=" not in i or "/" in i.partition("=")[0] or os.path.isfile(i)]
    if len(files) > 1:
        raise UserError(f"two configurations, {files[0]} and {files[1]}: give one; write fields as section.field=value")
    return (files[0] if files else None), [i for i in items if i not in files]


def bounded(kind: type[T], low: float, high: float) -> Callable[[str], T]:
    """An argparse type: an int or a float from ``low`` to ``high``."""

    def parse(text: str) -> T:
        number = re.fullmatch(r"[-+]?[0-9]{1,20}" if kind is int else r"[-+.0-9eE]{1,40}", text.strip())
        try:
            value = kind(text) if number else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {what} from {low:.16g} to {high:.16g}")
        return value

    return parse


MOST = 10**9  # upper bound of options that are counts
positive, natural = bounded(int, 1, MOST), bounded(int, 0, MOST)
processes, threads = bounded(int, 1, 1024), bounded(int, 0, MOST_THREADS)
seed = bounded(int, 0, MOST_SEED)


class FaultTolerantStream:
    """A text stream that ignores write errors such as a full disk, or a terminal or pipe that is closed."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self._ignoring_errors(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._ignoring_errors(self.stream.flush)

    def _ignoring_errors(self, call: Callable[..., object], *args: str) -> None:
        with suppress(OSError):
            call(*args)

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding, buffer
        return getattr(self.stream, name)


def print_run_folder(folder: str, field: str) -> None:
    """Print the absolute path of ``folder`` for a batch script. Raises ``UserError`` for one that it cannot read."""
    folder = os.path.abspath(folder)
    if any(c < " " for c in folder):
        raise UserError(
            f"{field} = {folder!r} contains a control character, which a batch script cannot read: rename it"
        )
    sys.stdout.buffer.write(os.fsencode(folder) + b"\n")
    sys.stdout.flush()


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print ``rows`` under ``title`` to standard output; lines are not wrapped for programs that read them."""
    from rich.table import Table

    from megastar.utils.console import PlainConsole

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(one_line(name), one_line(str(value)))
    console = PlainConsole(width=None if sys.stdout.isatty() else 1000)
    console.print(title, table, sep="\n")


def main_console() -> Console:
    """The shared console, silent on all ranks but the first."""
    from megastar.utils.console import PlainConsole
    from megastar.utils.logs import shared_console

    return shared_console() if place_of(os.environ)[0] == 0 else PlainConsole(quiet=True)


# Launchers ---------------------------------------------------------------------------------------------------------
def own_device(name: str) -> str:
    """Under a launcher, "auto" and "cuda" select the GPU of this process's local rank."""
    import torch

    _, world, local = place_of(os.environ)
    gpus = torch.cuda.device_count()
    return f"cuda:{local % gpus}" if name in ("auto", "cuda") and world > 1 and gpus else name


def report_error(message: str, environ: Mapping[str, str]) -> None:
    """Report a user error once: rank 0 prints it; below our own launcher, which prints it, no rank does.

    Other ranks write it to the error file of torch's launchers. Without such a file, as below srun, the first rank of
    each other node prints it with the node's name, since the cause may be on that node; other ranks are silent.
    """
    message, path = redact(message), environ.get("TORCHELASTIC_ERROR_FILE")
    with suppress(UserError):  # the launcher's variables are what is wrong
        rank, _, local = place_of(environ)
        if rank and not path:
            if not local:
                print_error(f"{message} (on {host_name()})")
            return
    if path and (environ.get("RANK") != "0" or LAUNCHED_BY_US in environ):
        try:
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
            return
        except OSError:  # a full disk
            pass
    print_error(message)


def print_error(message: str) -> None:
    """Print one sentence on standard error."""
    say(f"megastar: error: {one_entry(message)}", sys.stderr)


def add_score_options(p: Any, *, required: bool) -> None:
    """Add the scoring options of ``evaluate`` and ``sample --score``, except those whose names differ between commands (the input, --out, --batch)."""
    p.add_argument(
        "--real", required=required, help="reference: VIRTUAL_*.npz of ADM; folder, tar or .npz of images; token shards"
    )
    p.add_argument("--real-subset", help="use only real images in this top-level folder of a folder or tar")
    p.add_argument("--real-sha256", help="fail unless the reference has this SHA-256")
    p.add_argument("--real-tokenizer", help="tokenizer that decodes the token shards of --real")
    p.add_argument("--inception", help="file with FID's Inception weights; never downloaded")
    p.add_argument("--inception-sha256", help="SHA-256 of a custom Inception file")
    p.add_argument("--dinov2", help="file with DINOv2's weights, for FD-DINOv2 (ViT-L/14); never downloaded")
    p.add_argument("--features", help="without --inception and --dinov2: efflite0 (default) or module:function")
    p.add_argument(
        "--metrics",
        help="comma-separated: with --inception fid,sfid,is,pr,kid (default fid,sfid,is,pr), with --dinov2 "
        "fd_dinov2,pr,kid (default fd_dinov2), else fd,pr,kid (default fd)",
    )
    p.add_argument("--is-split", type=positive, help="images per split for IS (default 5000, as in ADM)")
    p.add_argument("--kid-subsets", type=positive, help="random subsets for KID (default 100)")
    p.add_argument("--kid-size", type=positive, help="images per subset for KID (default 1000)")
    p.add_argument("--allow-few", action="store_true", help="score fewer images than a metric requires, for testing")


def score_options_of(a: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``evaluation.runner``; ``seed`` selects KID's subsets. Raises ``UserError``."""
    from megastar.evaluation.options import Settings

    if a.inception_sha256 and a.inception is None:
        raise UserError(
            f"--inception-sha256 {a.inception_sha256} is the hash of a file: name the file with --inception"
        )
    for option in ("inception", "dinov2"):
        if getattr(a, option) is not None and a.features not in (None, option):
            raise UserError(f"--{option} and --features {a.features} select different networks: give one")
    if a.inception is not None and a.dinov2 is not None and not getattr(a, "fdr", None):
        raise UserError("--inception and --dinov2 select different networks: give one, and score twice")
    metrics = [m.strip().lower() for m in a.metrics.split(",") if m.strip()] if a.metrics else None
    features = a.features or "efflite0"
    if features == "efflite0" and a.dinov2 is None and metrics:  # reports that a file is missing
        features = "inception" if set(metrics) & {"fid", "sfid", "is"} else features
        features = "dinov2" if set(metrics) == {"fd_dinov2"} else features
    settings = {k: v for k in SETTINGS if (v := getattr(a, k)) is not None}
    names = ("inception", "inception_sha256", "dinov2", "real_subset", "real_sha256", "real_tokenizer")
    kwargs = {name: getattr(a, name) for name in names}
    if a.real_tokenizer:
        from megastar.checkpoint.hub.download import local_tokenizer

        kwargs["real_tokenizer"] = local_tokenizer(a.real_tokenizer)
    return kwargs | {"metrics": metrics, "features": features, "settings": Settings(**settings, seed=seed)}


def given_score_options(a: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that were given, as typed: ``--kid-size 50``."""
    given = [
        (f"--{name.replace('_', '-')}", value) for name in names if (value := getattr(a, name)) not in (None, False)
    ]
    return [option if value is True else f"{option} {value}" for option, value in given]
