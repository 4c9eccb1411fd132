"""Outputs that appear complete or not at all: free space is checked first, and files are renamed only when verified."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from megastar.errors import UserError
from megastar.utils.files import check_regular, check_space, existing_parent, sync_folder
from megastar.utils.lockfile import is_running

SLACK = 1 << 20  # bytes, for headers and folder entries
READS_BACK = "differs from what was written: check the disk"  # after a path


@contextmanager
def staged(out: Path, need: int, force: bool, holds: Sequence[str] = ()) -> Iterator[Path]:
    """A path to write ``out`` (``need`` bytes) to; it is renamed to ``out`` when the block succeeds.

    ``holds``: empty for a file; for a folder, patterns of its expected content: ``force`` removes nothing else.
    Raises ``UserError`` for an existing output without ``force``, and for a disk with too little free space.
    """
    check_free(out, need, force, holds)
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{out.name}.writing-{socket.gethostname()}-"
    for left in out.parent.glob(f"{mark}*"):  # left by a killed conversion on this machine
        pid = re.sub(r"\D.*", "", left.name.removeprefix(mark))  # 7, 7-former or 7.tmp
        if not is_running(int(pid or 0)):
            remove(left)
    temporary, former = out.with_name(f"{mark}{os.getpid()}"), out.with_name(f"{mark}{os.getpid()}-former")
    remove(temporary)
    if holds:
        temporary.mkdir()
    try:
        yield temporary
        if holds and out.exists():  # rename replaces files only
            out.rename(former)
        temporary.replace(out)
        sync_folder(out.parent)
    finally:
        remove(temporary)
        if former.exists() and not out.exists():
            former.rename(out)
        remove(former)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(out: Path, need: int, force: bool, holds: Sequence[str] = ()) -> None:
    """Raise ``UserError`` unless ``out`` may be written and fits; see ``staged``."""
    if not holds:
        check_regular(out)
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: name the folder to write")
    if out.exists() and (not holds or any(out.iterdir())):
        if not force:
            raise UserError(f"{out} exists: choose another path, or pass --force to replace it")
        others = [p.name for p in sorted(out.iterdir()) if not any(fnmatch(p.name, h) for h in holds)] if holds else []
        if others:
            raise UserError(
                f"{out} also contains {', '.join(others[:3])}, which --force would remove: choose another path"
            )
    there = existing_parent(out.parent)
    if not there.is_dir():
        raise UserError(f"{out}: {there} is a file, not a folder: choose another path")
    check_space(there, need + SLACK, f"{out} needs")


def settle(path: Path) -> None:
    """Flush a written file to the disk and drop its cached pages, so that the next read comes from the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
