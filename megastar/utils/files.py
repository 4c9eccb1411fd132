"""Atomic writes, and hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, fsync, rename: after a crash the file has all of ``data`` or its former content.

    Several processes may write the same file: the last one wins. A device or pipe is written to directly.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """``write_atomic`` of indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Append ``line`` durably; if a crash truncated the last line, start a new one first."""
    with path.open("a+b") as f:
        cut = f.seek(0, os.SEEK_END) > 0 and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n"
        f.write((b"\n" if cut else b"") + line.encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_small(path: Path, most: int) -> bytes | None:
    """The content of a file of at most ``most`` bytes; None for a larger or unreadable one."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            return f.read(size) if size <= most else None  # read() allocates the requested size
    except OSError:
        return None


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return sha256_of(f)


def sha256_of(f: BinaryIO) -> str:
    """SHA-256 of an open file, from its beginning, in hexadecimal."""
    digest = hashlib.sha256()
    f.seek(0)
    while part := f.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()
