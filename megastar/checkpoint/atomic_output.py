"""Outputs that appear whole or not at all: room is looked for first, and nothing has its name before it was checked."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megastar.errors import UserError
from megastar.utils.files import sync_folder

SLACK = 1 << 20  # bytes, for headers and folder entries


@contextmanager
def staged(out: Path, need: int, force: bool, holds: Sequence[str] = ()) -> Iterator[Path]:
    """Where to write ``out`` (``need`` bytes), a path beside it that becomes ``out`` when the block ends well.

    ``holds`` is empty for a file; for a folder it names (as patterns) what such a folder holds: ``force`` removes
    nothing else. Raises ``UserError`` for an output that exists, and for a disk with too little room.
    """
    check_free(out, need, force, holds)
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{out.name}.writing-{socket.gethostname()}-"
    for left in out.parent.glob(f"{mark}*"):  # what a killed conversion of this machine left
        if not _is_running(left.name.removeprefix(mark)):
            remove(left)
    temporary, former = out.with_name(f"{mark}{os.getpid()}"), out.with_name(f"{mark}{os.getpid()}-former")
    remove(temporary)
    if holds:
        temporary.mkdir()
    try:
        yield temporary
        if holds and out.exists():  # only files are replaced in one go
            out.rename(former)
        temporary.replace(out)
        sync_folder(out.parent)
    finally:
        remove(temporary)
        if former.exists() and not out.exists():
            former.rename(out)
        remove(former)


def _is_running(process: str) -> bool:
    """Whether the process whose number begins the name runs: 7, 7-former, 7.tmp (a weights file at work)."""
    try:
        os.kill(int(re.split(r"\D", process, maxsplit=1)[0]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(out: Path, need: int, force: bool, holds: Sequence[str] = ()) -> None:
    """Whether ``out`` may be written and has room; see ``staged``."""
    if not holds and out.is_dir():
        raise UserError(f"{out} is a folder: name the file to write")
    if holds and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name the folder to write")
    if out.exists() and (not holds or any(out.iterdir())):
        if not force:
            raise UserError(f"{out} exists: name another place, or replace it with --force")
        others = [p.name for p in sorted(out.iterdir()) if not any(fnmatch(p.name, h) for h in holds)] if holds else []
        if others:
            raise UserError(
                f"{out} holds other things too ({', '.join(others[:3])}), which --force would remove: name another place"
            )
    there = next(p for p in (out.parent, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file, so {out} cannot be below it: name another place")
    free = shutil.disk_usage(there).free
    if free < need + SLACK:
        raise UserError(
            f"{out} needs {(need + SLACK) / 1e6:.0f} MB and {there} has {free / 1e6:.0f} MB free: "
            "free space or name another place"
        )


def settle(path: Path) -> None:
    """Bring a written file to the disk, and forget its cached pages: what is read next is what the disk holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@contextmanager
def byte_bar(console: Console | None, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over ``total`` bytes; the function in hand advances it. Nothing without a terminal."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    hidden = console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
