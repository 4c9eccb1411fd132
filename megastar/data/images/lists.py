"""A list of images: ``path<TAB>class``, ``path class`` or ``path`` per line, relative to the list's folder.

UTF-8 or UTF-16 with a byte order mark, any line ends; blank lines and lines that begin with ``#`` are skipped; a path may
be in double or single quotes.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megastar.data.images.companions import class_name
from megastar.data.images.hidden import is_sidecar
from megastar.data.images.listing import ListingBuilder, is_image, text
from megastar.errors import UserError
from megastar.utils.files import read_regular

LISTS = (".txt", ".tsv", ".lst", ".list")
_MOST_LIST = 256 << 20  # bytes
_THREADS, _AT_ONCE = 8, 1000  # paths that are looked up at once: on a file server each takes a round trip
_QUOTED = re.compile(rb"""(["'])(.+?)\1(?:\s+(.*))?""")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)
Row = tuple[int, bytes, str | None]  # number of the line, path, class


def add_list(found: ListingBuilder, path: Path) -> None:
    """Add the images of the list ``path``. Raises ``UserError`` that names the line of what is wrong."""
    rows = list(_rows(path))
    without = [row for row in rows if row[2] is None]
    if 0 < len(without) < len(rows):
        number, name, _ = without[0]
        raise UserError(
            f"{path}: {len(without)} of {len(rows)} lines have no class, the first is {text(name)!r} (line {number}): give a class on every line or on none"
        )
    seen: dict[bytes, Row] = {}
    for row in rows:
        number, name, value = row
        if is_sidecar(name):
            found.findings.count("hidden", text(name))
            continue
        first = seen.setdefault(name, row)
        if first[2] != value:
            raise UserError(
                f"{path}, line {number}: {text(name)[:80]!r} has class {value!r}, but {first[2]!r} on line {first[0]}: give it one class"
            )
        if first is not row:
            found.findings.count("repeated", f"{text(name)}, line {number}")
    _check_classes(path, seen)
    _check_files(path, seen)
    for number, name, value in seen.values():
        found.add(name, -1, -1, -1, value)
        if value is None and not found.findings.outside and (name.startswith(b"../") or os.path.isabs(name)):
            found.findings.outside = f"line {number}: {text(name)}"
    if seen and not without:
        found.findings.label_from["list"] = len(seen)


def _rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        name, cls = line.strip(), None
        if not name or name.startswith(b"#"):
            continue
        if quoted := _QUOTED.fullmatch(name):
            name, cls = quoted[2], quoted[3]
        elif b"\t" in name:
            name, cls = (part.strip() for part in name.split(b"\t", 1))
        elif not is_image(name) and len(words := name.rsplit(None, 1)) == 2:
            name, cls = words
        if not is_image(name) or cls == b"":
            raise UserError(
                f"{path}, line {number}: {text(line)[:80]!r} is not an image path with or without a class: write path<TAB>class"
            )
        yield number, os.path.normpath(name), None if cls is None else class_name(text(cls), f"{path}, line {number},")


def _lines(path: Path) -> list[bytes]:
    """Lines in UTF-8, or in the bytes of the file system's names."""
    data = read_regular(path, _MOST_LIST)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise UserError(f"{path} begins as UTF-16 text but is not ({error.reason}): save it as UTF-8") from error
    elif b"\0" in data[:4096]:
        raise UserError(f"{path} contains NUL bytes, so it is not text, or UTF-16 without its mark: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8).splitlines()


def _check_classes(path: Path, seen: dict[bytes, Row]) -> None:
    """Numbers that cannot be classes would become names: -1 of a test list, 0.0 of a spreadsheet."""
    values = {value: number for number, _, value in reversed(seen.values()) if value is not None}
    odd = [v for v in values if not (v.isascii() and v.isdigit()) and _NUMBER.fullmatch(v)]
    if odd and all(_NUMBER.fullmatch(v) for v in values):
        first = min(odd, key=values.__getitem__)
        raise UserError(
            f"{path}, line {values[first]}: class {first!r} is not an integer from 0: write such integers, or names, or leave out the class of every line"
        )


def _check_files(path: Path, seen: dict[bytes, Row]) -> None:
    """Raise ``UserError`` for images that do not exist."""
    root = os.fsencode(path.parent)
    rows = list(seen.values())

    def missing(start: int) -> list[Row]:
        return [row for row in rows[start : start + _AT_ONCE] if not os.path.exists(os.path.join(root, row[1]))]

    with ThreadPoolExecutor(_THREADS) as pool:
        gone = [row for part in pool.map(missing, range(0, len(rows), _AT_ONCE)) for row in part]
    if not gone:
        return
    number, name, value = gone[0]
    hint = f"paths are relative to {path.parent}"
    first, _, rest = name.partition(b" ")
    if value is None and rest and os.path.exists(os.path.join(root, rest.strip())):
        hint = f"write the class {text(first)!r} after the path, path<TAB>class"
    raise UserError(
        f"{path}, line {number}: {text(name)[:200]} does not exist ({len(gone)} of {len(rows)} images are missing): {hint}"
    )
