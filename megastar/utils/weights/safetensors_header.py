"""The header of a safetensors file, read without torch and checked against the file before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megastar.errors import UserError
from megastar.utils.files import open_regular
from megastar.utils.json_file import check, core, dict_of, integer, list_of, one_of, parse_json, record, text, validator

MAX_HEADER = 16 << 20  # bytes; that of the largest network has half a megabyte
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_NAME = core.str_schema(strict=True, min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f\\]+$")
_ENTRY = record(
    {"dtype": one_of(*ITEMSIZE), "shape": list_of(integer(), high=16), "data_offsets": list_of(integer(), 2, 2)}
)
_METADATA = validator(dict_of(text(1000), text(MAX_HEADER)))
_ENTRIES = validator(dict_of(_NAME, _ENTRY))


class Entry(NamedTuple):
    """A tensor's location: safetensors type name, shape, and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@contextmanager
def utf8_name(path: str | Path) -> Iterator[str]:
    """A UTF-8 name of the file at ``path``, valid in the block: the safetensors library accepts no other names."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with open_regular(Path(path)) as f:
            yield f"/proc/self/fd/{f.fileno()}"
    else:
        yield name


def open_tensors(path: str | Path) -> Any:
    """``safetensors.safe_open`` for torch; its ``get_tensor`` returns a tensor of the file."""
    from safetensors import safe_open

    with utf8_name(path) as name:
        return safe_open(name, "pt")


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a safetensors file.

    Raises ``UserError`` if it is truncated, padded or malformed: the tensors must have the sizes of their shapes and
    fill the file without gaps or overlaps.
    """
    remedy = "copy or convert it again"
    where = f"the header of {path}"
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise UserError(
                    f"{path} is damaged or not a readable safetensors file (a header of {length} bytes in a file of {size}): "
                    f"{remedy}"
                )
            header = parse_json(f.read(length), where, None, remedy)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or restore it") from error
    if not isinstance(header, dict):
        raise UserError(f"{where} is damaged: it is a {type(header).__name__}, not an object: {remedy}")
    metadata = header.pop("__metadata__", None) or {}
    check(metadata, where, _METADATA, remedy)
    check(header, where, _ENTRIES, remedy)
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        wanted = math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]]
        if start != end or stop - start != wanted:
            raise UserError(
                f"{where} is damaged: data_offsets of {name} are {start} to {stop}, expected {end} to {end + wanted} for "
                f"{entry['dtype']} of shape {entry['shape']}: {remedy}"
            )
        end = stop
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + stop)
    if 8 + length + end != size:
        raise UserError(f"{path} is damaged: it has {size} bytes, its header describes {8 + length + end}: {remedy}")
    return metadata, {name: entries[name] for name in header}
