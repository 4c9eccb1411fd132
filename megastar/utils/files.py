"""Atomic writes, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from megastar.errors import UserError
from megastar.utils.lockfile import is_running


def check_regular(path: Path) -> None:
    """Raise ``UserError`` if ``path`` exists and is not a file that a rename may replace."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise UserError(f"{path} is {kind}: name the file to write")


def is_plain_name(name: object) -> bool:
    """Whether ``name``, which was read from a file, can only name a visible entry of the folder that it is joined to."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= 250:
        return False
    return name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")


def existing_parent(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def check_space(path: Path, need: int, what: str, advice: str = "free space or choose another path") -> None:
    """Raise ``UserError`` if the disk of ``path``, which may not exist yet, has less than ``need`` bytes free.

    ``what`` and ``advice`` begin and end the sentence: "the images need" 5.0 MB and FOLDER has 1.0 MB free: "free space".
    """
    from rich.filesize import decimal

    there = existing_parent(path)
    if (free := shutil.disk_usage(there).free) < need:
        raise UserError(f"{what} {decimal(need)} and {there} has {decimal(free)} free: {advice}")


def check_output(path: Path, name: str, inputs: Iterable[str | Path | None] = (), folder: bool = False) -> None:
    """Raise ``UserError`` unless the file (or ``folder``) ``path`` can be written. Called before hours of work.

    Leaves no file. ``name``: the option, for the message. ``inputs``: files that must not be overwritten. A device or
    pipe is allowed: it is written to, not replaced. Missing folders above ``path`` are allowed: the writer makes them.
    """
    there = existing_parent(path)
    for part in (path, *path.parents) if folder else path.parents:
        if os.path.islink(part) and not os.path.exists(part):
            problem = f"{part} is a symbolic link to {os.readlink(part)}, which does not exist"
            raise UserError(f"{name} {path}: {problem}: name another place")
    if folder and there == path and not os.path.isdir(path):
        raise UserError(f"{name} {path} is not a folder: name another place")
    if not folder and os.path.isdir(path):
        raise UserError(f"{name} {path} is a folder: name the file to write")
    for other in inputs:
        if other and there == path and os.path.exists(other) and os.path.samefile(path, other):
            raise UserError(f"{name} {path} would overwrite the input {other}: name another file")
    if there == path and not folder:
        if not path.is_file():
            return
        there = path.parent
    if not os.path.isdir(there):
        raise UserError(f"{name} {path}: {there} is not a folder: name another place")
    missing = [part.name for part in (path, *path.parents) if part != there and not os.path.exists(part)]
    probe = there if folder else temporary_path(there / path.name)  # as atomic_file does: the name may be too long
    try:
        for folder_name in missing:  # to make
            with suppress(FileNotFoundError):
                os.lstat(there / folder_name)
        with tempfile.TemporaryFile(dir=there) if folder else probe.open("xb") as f:
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        remedy = "free space or name another place"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "change its permissions or name another place"
        elif error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
            remedy = "give another name"
        raise UserError(f"{name} {path} cannot be written ({error.strerror}): {remedy}") from error
    finally:
        if not folder:
            with suppress(OSError):
                probe.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other process uses; ``remove_dead_temporaries`` finds it."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_dead_temporaries(folder: Path) -> None:
    """Remove the temporary files of this machine's processes that were killed."""
    for path in folder.glob("*.tmp"):
        found = re.fullmatch(r".*\.(\d+)(-[0-9a-f]{8})?\.tmp", path.name)
        if found and f".{socket.gethostname()}." in path.name and not is_running(int(found[1])):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents. Raises ``UserError`` if something else exists there, or creation fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        there = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), folder)
        if os.path.islink(there) and not os.path.exists(there):
            problem = f"{there} is a symbolic link to {os.readlink(there)}, which does not exist"
        elif os.path.exists(there) and not os.path.isdir(there):
            problem = f"{there} is not a folder"
        else:
            problem = error.strerror or str(error)
        raise UserError(f"the folder {folder} cannot be created ({problem}): choose another folder") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end of the block it is synced and renamed to ``path``.

    If the block fails, ``path`` is unchanged. Raises ``UserError`` if ``path`` is a folder, a device or a pipe.
    """
    check_regular(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """After a crash the file has all of ``data`` or its former content. Errors as ``atomic_file``.

    Several processes may write the same file: the last one wins.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_output(path: Path, data: bytes) -> None:
    """``write_atomic`` of a file that the user names: a device or a pipe is written to directly."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        write_atomic(path, data)


def write_json(path: Path, content: object) -> None:
    """``write_output`` of indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, (json.dumps(content, indent=1) + "\n").encode())


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


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises ``UserError`` for a pipe, a device, a folder or a socket, without blocking, and
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
        raise UserError(f"{path} has {size} bytes, more than the limit of {most} for this file: restore it")
    return data


def read_at_most(f: BinaryIO, most: int) -> bytes | None:
    """The content of an open file; None for one of more than ``most`` bytes."""
    size = os.fstat(f.fileno()).st_size
    return f.read(size) if size <= most else None  # read() allocates the requested size


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
