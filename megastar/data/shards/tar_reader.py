"""A strict walk over a tar in memory; nothing is extracted.

The checksum and size of every header are checked, and the walk only moves forward. It reads what `tarfile` and
`webdataset` write: ustar, GNU long names, pax paths and sizes. Links, devices and sparse files are rejected.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple
from zlib import adler32

from megastar.errors import UserError

BLOCK = 512  # tar's unit
_MAX_EXTENDED = 1 << 20  # bytes of an extended header: usual ones have a few hundred
_MAX_NAME = 4096
_STEP = 1 << 20
_NUMBERS = (b"\0", b"0", b"7")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}

Buffer = mmap.mmap | bytes


class Member(NamedTuple):
    """A file of a tar."""

    name: str
    start: int  # of its data, in bytes from the start of the tar
    size: int  # in bytes


def walk(data: Buffer, where: str) -> Iterator[Member]:
    """The files of the tar ``data`` in order, without directories. ``where`` names the tar in messages.

    Raises ``UserError`` for a broken header, a member that ends beyond the file, a missing end-of-archive marker (so a
    tar truncated anywhere is found), data after it, a link or device, and a name that is absolute, leaves the folder or
    contains a NUL.
    """
    position, end = 0, len(data)
    name: str | None = None  # from an extended header, for the next member
    size: int | None = None
    while True:
        if position + BLOCK > end:
            raise damaged(where, f"ends at byte {end} without an end-of-archive marker: it was truncated")
        block = data[position : position + BLOCK]
        if block[0] == 0 and not any(block):
            if name is not None or size is not None:
                raise damaged(where, f"has a broken header at byte {position}")
            _only_zeros(data, position, where)
            return
        found, length, kind = _header(block, where, position)
        start = position + BLOCK
        if kind in _NUMBERS:
            if size is not None:
                length = size
            if name is not None:
                found = name
            name = size = None
            position = _after(found, start, length, end, where)
            if not found.endswith("/"):  # a directory in the oldest format
                yield Member(_checked(found, where), start, length)
        elif kind == b"5":
            name = size = None
            position = start
        elif kind in (b"x", b"g", b"L", b"K"):
            if length > _MAX_EXTENDED:
                raise damaged(where, f"has an extended header of {length} bytes at byte {position}")
            position = _after("an extended header", start, length, end, where)
            body = bytes(data[start : start + length])
            if kind == b"L":
                name = _text(body.partition(b"\0")[0])
            elif kind != b"K":
                fields = _pax(body, where, start)
                if any(k.startswith("GNU.sparse") for k in fields):
                    raise UserError(
                        f"token shard {where} holds a sparse file at byte {start}: store regular files only"
                    )
                if kind == b"x":
                    name, size = fields.get("path", name), _pax_size(fields, where, start)
                elif "path" in fields or "size" in fields:
                    raise damaged(where, f"has a global header with a path or size at byte {start}")
        else:
            what = _KINDS.get(kind, f"a member of type {kind!r}")
            raise UserError(f"token shard {where} holds {what}, {shown(name or found)}: store regular files only")


def damaged(where: str, what: str) -> UserError:
    return UserError(f"token shard {where} {what}; copy it again or pretokenize again")


def shown(name: str) -> str:
    """An untrusted name, escaped and shortened for a message."""
    text = name if name.isprintable() and name else repr(name)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _header(block: bytes, where: str, position: int) -> tuple[str, int, bytes]:
    """Name, size and type. The checksum distinguishes a header from data."""
    try:
        # The lower half of adler32 is 1 + the sum of the bytes modulo 65521; 256 bytes sum to less.
        total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
        if total - sum(block[148:156]) + 8 * 32 != _octal(block[148:156]):
            raise ValueError
        size = _octal(block[124:136]) if block[124] < 128 else _base_256(block[124:136])
    except ValueError:
        raise damaged(where, f"has a broken header at byte {position}") from None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name), size, block[156:157]


def _octal(field: bytes) -> int:
    digits = field.partition(b"\0")[0].strip(b" ") or b"0"
    if not digits.isdigit():  # int() takes signs and underscores too
        raise ValueError
    return int(digits, 8)


def _base_256(field: bytes) -> int:
    """GNU's encoding of sizes from 8 GiB."""
    if field[0] != 0x80:
        raise ValueError
    return int.from_bytes(field[1:], "big")


def _after(name: str, start: int, size: int, end: int, where: str) -> int:
    """Position of the next header."""
    if start + size > end:
        raise damaged(where, f"ends inside {shown(name)}: it was truncated")
    return start + -(-size // BLOCK) * BLOCK


def _pax(body: bytes, where: str, position: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header."""
    fields, at = dict[str, str](), 0
    while at < len(body) and body[at]:
        number, space, _ = body[at : at + 8].partition(b" ")
        length = int(number) if number.isdigit() and space else 0
        record = body[at + len(number) + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if at + length > len(body) or not equals or record[-1:] != b"\n":
            raise damaged(where, f"has a broken header at byte {position + at}")
        fields[_text(key)] = _text(value)
        at += length
    return fields


def _pax_size(fields: dict[str, str], where: str, position: int) -> int | None:
    if (size := fields.get("size")) is None:
        return None
    if not (size.isascii() and size.isdigit() and len(size) <= 20):
        raise damaged(where, f"has a broken header at byte {position}")
    return int(size)


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _checked(name: str, where: str) -> str:
    if not name or len(name) > _MAX_NAME or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"token shard {where} holds a member named {shown(name)}: names must be relative, without '..'")
    return name


def _only_zeros(data: Buffer, position: int, where: str) -> None:
    """Check that nothing follows the end-of-archive marker: of two concatenated tars only the first would be read."""
    for at in range(position, len(data), _STEP):
        if any(part := data[at : at + _STEP]) and part.strip(b"\0"):
            raise damaged(where, f"has data after its end-of-archive marker at byte {position}")
