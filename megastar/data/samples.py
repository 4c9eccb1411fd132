"""What the members of a shard mean. Both layouts and the sets of other writers are read here, from a walk over the tar.

plain   a sample is ``KEY.codes.npy`` (or ``KEY.npy``): the codes; ``KEY.cls``: its class in ASCII, else "label" in
        ``KEY.json``; ``KEY.json``: {"source": name of the picture}, if there
packed  a block of n samples is ``KEY.codes.npy`` (n, views, T), ``KEY.cls.npy`` (n,), ``KEY.json`` {"sources": [...]}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import numpy as np

from megastar.data.tar import AGAIN, Buffer, Member, shown, walk
from megastar.errors import UserError

LAYOUTS = ("plain", "packed")  # in the index by their place here
DTYPES = {
    "uint16": "<u2",
    "uint8": "|u1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint32": "<u4",
    "uint64": "<u8",
}
CODES = ("codes.npy", "npy")  # the first that a sample has

_NPY = re.compile(
    rb"\{\s*'descr':\s*'([<|][ui]\d)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d, ]*)\),?\s*\}[ ]*\n?"
)
_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)")  # webdataset's: up to the first dot of the last part
_LONGEST_NOTE = 64 << 20  # bytes of a json member


@dataclass(frozen=True)
class Array:
    """An npy member, not read."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # of the first number, in bytes from the tar's beginning


@dataclass
class Samples:
    """The n samples of a shard, in the tar's order."""

    offsets: np.ndarray  # (n,) int64, of the first code
    labels: np.ndarray  # (n,) int64
    keys: list[str] = field(repr=False)
    arrays: list[Array] = field(repr=False)  # that hold the codes: one a sample, or one a block
    sources: list[str] = field(default_factory=list, repr=False)


@dataclass
class Expected:
    """What the codes of a set are: views x tokens of a dtype. ``why`` ends the message about those that are not."""

    dtype: str
    views: int
    tokens: int
    why: str = "as the manifest says: pretokenize again"

    @property
    def bytes(self) -> int:
        """Of one sample."""
        return self.views * self.tokens * np.dtype(DTYPES[self.dtype]).itemsize


def find_samples(
    data: Buffer, where: str, layout: str, expected: Expected | None, limit: int | None = None, sources: bool = False
) -> Samples:
    """Walk the tar ``data`` and find its samples; with ``expected`` their codes are compared with it.

    ``limit``: how many samples there may be. ``sources`` reads the names of the pictures too: the key, where the set
    has none. Raises ``UserError``, naming file and member, for whatever is not as the layout wants it.
    """
    codes: dict[str, tuple[Member, Array]] = {}
    classes: dict[str, Member] = {}
    notes: dict[str, Member] = {}
    headers: dict[bytes, tuple[str, tuple[int, ...]]] = {}
    label = "cls.npy" if layout == "packed" else "cls"
    second: dict[str, tuple[Member, Array]] = {}
    for member in walk(data, where):
        match = _KEY.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        if extension in CODES:
            target = codes if extension == CODES[0] else second
            if key in target:
                raise _twice(member, where)
            target[key] = member, _array(data, member, where, headers)
            if limit is not None and len(target) > limit:
                raise UserError(
                    f"token shard {where} holds more than the {limit} samples that the manifest says: it was changed, {AGAIN}"
                )
        elif extension == label or extension == "json":
            found = notes if extension == "json" else classes
            if key in found:
                raise _twice(member, where)
            found[key] = member
    if second and layout == "plain":
        codes = {**second, **codes} if codes else second
    for member, array in codes.values():
        _compare(member, array, where, layout, expected)
    read = _packed if layout == "packed" else _plain
    return read(data, where, codes, classes, notes, headers, sources)


def views_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(T,), (views, T) or (1, views, T) -> views, T. Raises ``ValueError`` for another shape."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if not 1 <= len(shape) <= 2 or 0 in shape:
        raise ValueError(shape)
    return (1, *shape) if len(shape) == 1 else shape  # type: ignore[return-value]


def _compare(member: Member, array: Array, where: str, layout: str, expected: Expected | None) -> None:
    shape = array.shape
    if layout == "packed":
        fine = len(shape) == 3 and shape[0] > 0
        shape = shape[1:]
    else:
        fine = True
    try:
        views, tokens = views_of(shape)
    except ValueError:
        fine = False
    if expected is not None and fine:
        fine = (array.dtype, views, tokens) == (expected.dtype, expected.views, expected.tokens)
    if not fine:
        wanted = (
            f"{expected.views} views of {expected.tokens} codes" if expected else "codes of shape (T,) or (views, T)"
        )
        raise UserError(
            f"token shard {where}: {shown(member.name)} is {array.dtype} of shape {array.shape}, not {wanted} "
            f"{f'in {expected.dtype} {expected.why}' if expected else ''}".rstrip()
        )


def _plain(data, where, codes, classes, notes, headers, sources) -> Samples:  # type: ignore[no-untyped-def]
    labels = np.empty(len(codes), np.int64)
    for row, (key, (member, _)) in enumerate(codes.items()):
        if (found := classes.get(key)) is not None:
            labels[row] = _integer(data, found, where)
        elif (note := notes.get(key)) is not None:
            labels[row] = _label(_json(data, note, where), note, where)
        else:
            raise UserError(f"token shard {where}: {shown(member.name)} has no class, {shown(key)}.cls: write one")
    for key, found in classes.items():
        if key not in codes:
            raise UserError(f"token shard {where}: {shown(found.name)} has no codes, {shown(key)}.codes.npy: {AGAIN}")
    names = []
    if sources:
        for key in codes:
            note = _json(data, notes[key], where) if key in notes else {}
            names.append(str(note.get("source", key)) if isinstance(note, dict) else key)
    arrays = [array for _, array in codes.values()]
    return Samples(np.array([a.start for a in arrays], np.int64), labels, list(codes), arrays, names)


def _packed(data, where, codes, classes, notes, headers, sources) -> Samples:  # type: ignore[no-untyped-def]
    offsets, labels, keys, names = [], [], [], list[str]()
    for key, (member, array) in codes.items():
        n, stride = array.shape[0], int(np.prod(array.shape[1:], dtype=object)) * np.dtype(array.dtype).itemsize
        offsets.append(array.start + stride * np.arange(n, dtype=np.int64))
        keys += [key] * n
        if key not in classes:
            raise UserError(f"token shard {where}: {shown(member.name)} has no classes, {shown(key)}.cls.npy: {AGAIN}")
        found = _array(data, classes[key], where, headers)
        if found.shape != (n,):
            raise UserError(
                f"token shard {where}: {shown(classes[key].name)} has shape {found.shape}, its codes are {n} samples: {AGAIN}"
            )
        labels.append(np.frombuffer(data, DTYPES[found.dtype], n, found.start).astype(np.int64))
        if sources:
            note = _json(data, notes[key], where) if key in notes else {}
            listed = note.get("sources") if isinstance(note, dict) else None
            if not isinstance(listed, list) or len(listed) != n:
                raise UserError(f"token shard {where}: {shown(key)}.json does not name its {n} sources: {AGAIN}")
            names += map(str, listed)
    for key, found in classes.items():
        if key not in codes:
            raise UserError(f"token shard {where}: {shown(found.name)} has no codes, {shown(key)}.codes.npy: {AGAIN}")
    none = [np.empty(0, np.int64)]
    arrays = [array for _, array in codes.values()]
    return Samples(np.concatenate(offsets or none), np.concatenate(labels or none), keys, arrays, names)


def _array(data: Buffer, member: Member, where: str, headers: dict[bytes, tuple[str, tuple[int, ...]]]) -> Array:
    """Read the header of an npy member. Headers are the same from sample to sample: each is parsed once."""
    start, end = member.start, member.start + member.size
    head = data[start : min(start + 12, end)]
    wide = head[6:7] in (b"\2", b"\3")
    body = start + (12 if wide else 10)
    length = int.from_bytes(head[8 : body - start], "little")
    if head[:6] != b"\x93NUMPY" or body > end or length > 4096:
        raise UserError(f"token shard {where}: {shown(member.name)} is not an array of numpy: write it with numpy.save")
    text = data[body : min(body + length, end)]
    if (known := headers.get(text)) is None:
        match = _NPY.fullmatch(text)
        sizes = [int(word) for word in match[3].replace(b",", b" ").split() if len(word) < 16] if match else []
        dtype = {v: k for k, v in DTYPES.items()}.get(match[1].decode() if match else "")
        if match is None or dtype is None or (match[2] == b"True" and sum(n > 1 for n in sizes) > 1):
            raise UserError(
                f"token shard {where}: {shown(member.name)} must hold integers in C order ({', '.join(DTYPES)}), its header says {shown(text[:200].decode(errors='backslashreplace').strip())}"
            )
        known = headers[bytes(text)] = dtype, tuple(sizes)
    dtype, shape = known
    wanted = np.dtype(DTYPES[dtype]).itemsize
    for n in shape:
        wanted *= n
    if body + length + wanted != end:
        raise UserError(
            f"token shard {where}: {shown(member.name)} has {member.size} bytes, an array of {dtype} of shape {shape} has {body + length - start + wanted}: {AGAIN}"
        )
    return Array(dtype, shape, body + length)


def _integer(data: Buffer, member: Member, where: str) -> int:
    text = data[member.start : member.start + min(member.size, 64)].strip()
    if member.size > 64 or not text.removeprefix(b"-").isdigit() or len(text) > 18:
        raise UserError(f"token shard {where}: {shown(member.name)} is not the number of a class: write it in digits")
    return int(text)


def _json(data: Buffer, member: Member, where: str) -> object:
    try:
        if member.size > _LONGEST_NOTE:
            raise ValueError(f"{member.size} bytes")
        return json.loads(data[member.start : member.start + member.size])
    except (ValueError, RecursionError) as error:
        raise UserError(f"token shard {where}: {shown(member.name)} is not JSON ({error}): {AGAIN}") from None


def _label(note: object, member: Member, where: str) -> int:
    label = note.get("label") if isinstance(note, dict) else None
    if type(label) is not int or abs(label) >= 2**62:
        raise UserError(
            f'token shard {where}: {shown(member.name)} has no class: write a member .cls, or an integer "label" there'
        )
    return label


def _twice(member: Member, where: str) -> UserError:
    return UserError(f"token shard {where} holds {shown(member.name)} twice: a key must be of one sample")
