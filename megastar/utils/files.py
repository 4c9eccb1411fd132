"""Atomic writes, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megastar.errors import UserError


def check_regular(path: Path) -> None:
    """Raise ``UserError`` if ``path`` exists and is not a file that a rename may replace."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise UserError(f"{path} is {kind}: name the file to write")


def existing_parent(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end of the block it is synced and renamed to ``path``.

    If the block fails, ``path`` is unchanged. Raises ``UserError`` if ``path`` is a folder, a device or a pipe.
    """
    check_regular(path)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """After a crash the file has all of ``data`` or its former content. A device or pipe is written to directly.

    Several processes may write the same file: the last one wins.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: object) -> None:
    """``write_atomic`` of indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append ``line`` durably; if a crash truncated the last line, start a new one first."""
    with path.open("a+b") as f:
        f.write((b"\n" if ends_within_line(f) else b"") + line.encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def ends_within_line(f: BinaryIO) -> bool:
    """Whether the last line lacks its newline, as after a crash or on a full disk."""
    if not f.seek(0, os.SEEK_END):
        return False
    f.seek(-1, os.SEEK_END)
    return f.read(1) != b"\n"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, or what a link to one names.

    Raises ``UserError`` for a pipe, a device, a folder or a socket, without waiting for what they would deliver, and
    ``OSError`` for a file that cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(path)!r:.200} is not the name of a file: correct it") from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise UserError(f"{path} is not a regular file: name or restore a file") from error
        raise
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise UserError(f"{path} is {kind}: name or restore a regular file")
    return os.fdopen(fd, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises ``UserError``."""
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            data = f.read(size) if size <= most else b""  # read() allocates the requested size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or restore it") from error
    if size > most:
        raise UserError(f"{path} has {size} bytes, more than the {most} that such a file may have: restore it")
    return data


def read_small(path: Path, most: int) -> bytes | None:
    """``read_regular``; None for a larger or unreadable file."""
    try:
        return read_regular(path, most)
    except UserError:
        return None


def read_lines(path: Path, most: int = 1 << 20) -> list[str]:
    """The lines in the last ``most`` bytes of a text file; none without a readable one."""
    try:
        with open_regular(path) as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - most))
            return f.read(most).decode(errors="replace").splitlines()
    except (OSError, UserError):
        return []


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path) as f:
        return sha256_of(f)


def sha256_of(f: BinaryIO) -> str:
    """SHA-256 of an open file, from its beginning, in hexadecimal."""
    digest = hashlib.sha256()
    f.seek(0)
    while part := f.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()
