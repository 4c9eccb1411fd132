"""Finds the samples of a shard in a walk over the tar, for both layouts and for sets of other writers.

plain   a sample is ``KEY.codes.npy`` (or ``KEY.npy``): the codes; ``KEY.cls``: its class in ASCII, else "label" in
        ``KEY.json``; optionally ``KEY.json``: {"source": name of the image}
packed  a block of n samples is ``KEY.codes.npy`` (n, views, T), ``KEY.cls.npy`` (n,), ``KEY.json`` {"sources": [...]}

Of a set whose manifest records features, each also has ``KEY.features.npy`` (features.py); others ignore that member.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from dataclasses import dataclass, field

import numpy as np

from megastar.data.shards.features import DTYPE, NUMPY, StoredFeatures
from megastar.data.shards.tar_reader import Buffer, Member, damaged, shown, walk
from megastar.errors import UserError

LAYOUTS = ("plain", "packed")  # the index stores the position in this tuple
DTYPES = {
    n: np.dtype(n).newbyteorder("<").str for n in ["uint16", "uint8", "int16", "int32", "int64", "uint32", "uint64"]
}
_NPY = re.compile(
    rb"\{\s*'descr':\s*'([<|][uif]\d)',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d, ]*)\),?\s*\}[ ]*\n?"
)
_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)")  # as in webdataset: up to the first dot of the last path component
_MAX_CLASSES = 1 << 20
_MAX_RESIDENT = 64 << 20  # bytes of a tar to keep in memory
_MAX_JSON_BYTES = 64 << 20
_Tables = dict[str, dict[str, Member]]  # kind of member -> key -> member
_Headers = dict[bytes, tuple[str, tuple[int, ...]]]  # npy headers parsed before: dtype and shape


def code_type(codebook_size: int) -> str:
    """The type in which codes of a codebook are stored and read: of two bytes up to 65,536 codes, else of four."""
    return "uint16" if codebook_size <= 1 << 16 else "int32"


@dataclass(frozen=True)
class Array:
    """Position and type of an npy member."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # of the first number, in bytes from the start of the tar
    name: str  # of the member


@dataclass
class Expected:
    """Type and shape of a sample's codes; ``why`` ends the message about codes that differ."""

    dtype: str
    views: int
    tokens: int
    why: str = "as the manifest records: pretokenize again"
    features: StoredFeatures | None = None

    @property
    def bytes(self) -> int:
        return self.views * self.tokens * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass
class Samples:
    """The n samples of a shard, in tar order."""

    offsets: np.ndarray  # (n,) int64, of the first code
    labels: np.ndarray  # (n,) int64
    keys: list[str] = field(repr=False)
    arrays: list[Array] = field(repr=False)  # of codes: one per sample or per block
    expected: Expected | None  # of all arrays; None without samples
    sources: list[str] = field(default_factory=list, repr=False)
    features: np.ndarray | None = None  # (n,) int64, of the first feature; None: not stored


def check_layout(layout: str) -> None:
    """Raise ``UserError`` for an unknown layout."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}")


def find_samples(
    data: Buffer, where: str, layout: str, expected: Expected | None, limit: int | None = None, sources: bool = False
) -> Samples:
    """Walk the tar ``data`` and find its samples; their codes must be as ``expected``, or all as the first sample's.

    ``limit``: maximum number of samples. ``sources``: read the names of the source images too (the key if there is no
    name). Raises ``UserError``, naming file and member, for anything that does not fit the layout.
    """
    tables: _Tables = {"codes": {}, "classes": {}, "notes": {}, "features": {}}
    arrays: dict[str, Array] = {}
    headers, of_features = _Headers({}), _Headers({})
    stored, encoded = expected.features if expected else None, dict[str, Array]()
    cls = "cls.npy" if layout == "packed" else "cls"
    kinds = {"codes.npy": "codes", "npy": "codes", cls: "classes", "json": "notes"}
    if stored is not None:
        kinds["features.npy"] = "features"
    for member in walk(data, where):
        match = _KEY.fullmatch(member.name)
        kind = kinds.get(match[2].lower()) if match else None
        if match is None or kind is None:
            continue
        key, table = match[1], tables[kind]
        if key in table:
            raise UserError(
                f"token shard {where} holds {shown(member.name)} and {shown(table[key].name)} for the same key: keys must be unique"
            )
        table[key] = member
        if kind == "codes":
            arrays[key] = array = _array(data, member, where, headers)
            expected = _compare(array, where, layout, expected)
            if limit is not None and len(arrays) > limit:
                raise damaged(where, f"holds more than the {limit} samples of the manifest: it was changed")
        elif kind == "features":
            encoded[key] = _array(data, member, where, of_features, {DTYPE: NUMPY.str})
    for key, member in tables["classes"].items():
        if key not in arrays:
            raise damaged(f"{where}: {shown(member.name)}", f"has no codes, {shown(key)}.codes.npy")
    for key, array in arrays.items():
        if key not in tables["classes"] and (layout == "packed" or key not in tables["notes"]):
            raise UserError(f"token shard {where}: {shown(array.name)} has no class: write {shown(key)}.cls")
    if isinstance(data, mmap.mmap):
        data.madvise(mmap.MADV_DONTNEED)  # the walk touched every page
    parse = _packed if layout == "packed" else _plain
    found = parse(data, where, arrays, tables, expected, sources)
    if stored is not None and expected is not None:
        found.features = _features(where, arrays, encoded, expected.views, stored, layout)
    return found


def _features(
    where: str, arrays: dict[str, Array], encoded: dict[str, Array], views: int, stored: StoredFeatures, layout: str
) -> np.ndarray:
    """Positions (n,) of the samples' features, in the order of their codes. Raises ``UserError``."""
    if lone := next((key for key in encoded if key not in arrays), None):
        raise damaged(f"{where}: {shown(encoded[lone].name)}", f"has no codes, {shown(lone)}.codes.npy")
    shape, offsets = (views, stored.patches, stored.width), [np.empty(0, np.int64)]
    for key, array in arrays.items():
        if (found := encoded.get(key)) is None:
            raise damaged(f"{where}: {shown(array.name)}", f"has no features, {shown(key)}.features.npy")
        wanted = (array.shape[0], *shape) if layout == "packed" else shape
        if found.shape != wanted:
            raise damaged(
                f"{where}: {shown(found.name)}", f"has shape {found.shape}, the manifest's features have {wanted}"
            )
        count = array.shape[0] if layout == "packed" else 1
        offsets.append(found.start + views * stored.bytes * np.arange(count, dtype=np.int64))
    return np.concatenate(offsets)


def check_codes(tar: mmap.mmap, found: Samples, where: str, codebook_size: int) -> None:
    """Raise ``UserError`` for a code outside the codebook. Reads the whole tar."""
    held = 0
    for array in found.arrays:
        codes = np.frombuffer(tar, DTYPES[array.dtype], math.prod(array.shape), array.start)
        if codes.max() >= codebook_size or codes.min() < 0:
            wrong = codes.min() if codes.min() < 0 else codes.max()
            raise UserError(
                f"token shard {where}: {shown(array.name)} holds code {wrong}, outside the codebook of {codebook_size}: give the tokenizer that made it"
            )
        held += codes.nbytes
        if held > _MAX_RESIDENT:
            tar.madvise(mmap.MADV_DONTNEED)
            held = 0


def check_classes(found: Samples, where: str, num_classes: int | None) -> None:
    """Raise ``UserError`` for a class that is not below ``num_classes`` (None: a million)."""
    limit = _MAX_CLASSES if num_classes is None else num_classes
    outside = (found.labels < 0) | (found.labels >= limit)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"token shard {where}: {shown(found.keys[row])} has class {found.labels[row]}, outside 0 to {limit - 1}: correct the class, or raise the number of classes"
        )


def views_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(T,), (views, T) or (1, views, T) -> views, T. Raises ``ValueError`` for another shape."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if not 1 <= len(shape) <= 2 or 0 in shape:
        raise ValueError(shape)
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def _compare(array: Array, where: str, layout: str, expected: Expected | None) -> Expected:
    """``expected`` if the array is so, or what it is if nothing was expected. Raises ``UserError`` if it differs."""
    shape = array.shape
    try:
        if layout == "packed":
            if len(shape) != 3 or not shape[0]:
                raise ValueError(shape)
            shape = shape[1:]
        views, tokens = views_of(shape)
        if expected is None:
            return Expected(array.dtype, views, tokens, f"as in {shown(array.name)} of {where}: a set has one shape")
        if (array.dtype, views, tokens) == (expected.dtype, expected.views, expected.tokens):
            return expected
        wanted = f"{expected.views} views of {expected.tokens} codes in {expected.dtype} {expected.why}"
    except ValueError:
        wanted = f"of shape ({'samples, views, T' if layout == 'packed' else 'views, T'}): write that shape"
    raise UserError(f"token shard {where}: {shown(array.name)} is {array.dtype} of shape {array.shape}, not {wanted}")


def _plain(
    data: Buffer, where: str, arrays: dict[str, Array], tables: _Tables, expected: Expected | None, sources: bool
) -> Samples:
    classes, notes, labels, names = tables["classes"], tables["notes"], np.empty(len(arrays), np.int64), list[str]()
    for row, key in enumerate(arrays):
        note = _json(data, notes[key], where) if key in notes and (sources or key not in classes) else None
        labels[row] = _integer(data, classes[key], where) if key in classes else _label(note, notes[key], where)
        names.append(str(note["source"]) if isinstance(note, dict) and "source" in note else key)
    offsets = np.fromiter((a.start for a in arrays.values()), np.int64, len(arrays))
    return Samples(offsets, labels, list(arrays), list(arrays.values()), expected, names)


def _packed(
    data: Buffer, where: str, arrays: dict[str, Array], tables: _Tables, expected: Expected | None, sources: bool
) -> Samples:
    classes, notes = tables["classes"], tables["notes"]
    offsets, labels, keys, names = [np.empty(0, np.int64)], [np.empty(0, np.int64)], list[str](), list[str]()
    for key, array in arrays.items():
        assert expected is not None
        n = array.shape[0]
        offsets.append(array.start + expected.bytes * np.arange(n, dtype=np.int64))
        keys += [key] * n
        found = _array(data, classes[key], where, _Headers({}))
        if found.shape != (n,):
            raise damaged(f"{where}: {shown(found.name)}", f"has shape {found.shape}, not one class per sample ({n})")
        labels.append(np.frombuffer(data, DTYPES[found.dtype], n, found.start).astype(np.int64))
        if sources:
            note = _json(data, notes[key], where) if key in notes else None
            listed = note.get("sources") if isinstance(note, dict) else None
            if not isinstance(listed, list) or len(listed) != n:
                raise damaged(f"{where}: {shown(key)}.json", f"does not list {n} sources")
            names += map(str, listed)
    return Samples(np.concatenate(offsets), np.concatenate(labels), keys, list(arrays.values()), expected, names)


def _array(data: Buffer, member: Member, where: str, headers: _Headers, dtypes: dict[str, str] = DTYPES) -> Array:
    """Read the header of an npy member. Samples share headers, so each distinct one is parsed once."""
    start, end = member.start, member.start + member.size
    head = data[start : min(start + 12, end)]
    wide = head[6:7] in (b"\2", b"\3")
    body = start + (12 if wide else 10)
    length = int.from_bytes(head[8 : body - start], "little")
    if head[:6] != b"\x93NUMPY" or body > end or length > 4096:
        raise UserError(f"token shard {where}: {shown(member.name)} is not a numpy array: write it with numpy.save")
    text = data[body : min(body + length, end)]
    if (parsed := headers.get(text)) is None:
        match = _NPY.fullmatch(text)
        sizes = [int(word) for word in match[3].replace(b",", b" ").split() if len(word) < 16] if match else []
        dtype = {v: k for k, v in dtypes.items()}.get(match[1].decode() if match else "")
        if match is None or dtype is None or (match[2] == b"True" and sum(n > 1 for n in sizes) > 1):
            raise UserError(
                f"token shard {where}: {shown(member.name)} must hold {'integers' if dtypes is DTYPES else 'numbers'} in C order ({', '.join(dtypes)}), its header is {shown(text[:200].decode(errors='backslashreplace').strip())}"
            )
        parsed = headers[bytes(text)] = dtype, tuple(sizes)
    dtype, shape = parsed
    wanted = np.dtype(dtypes[dtype]).itemsize * math.prod(shape)
    if body + length + wanted != end:
        size = body + length - start + wanted
        what = f"has {member.size} bytes, an array of {dtype} of shape {shape} has {size}"
        raise damaged(f"{where}: {shown(member.name)}", what)
    return Array(dtype, shape, body + length, member.name)


def _integer(data: Buffer, member: Member, where: str) -> int:
    text = data[member.start : member.start + min(member.size, 64)].strip()
    if member.size > 64 or not text.removeprefix(b"-").isdigit() or len(text) > 18:
        raise UserError(f"token shard {where}: {shown(member.name)} is not a class number: write it in decimal digits")
    return int(text)


def _json(data: Buffer, member: Member, where: str) -> object:
    try:
        if member.size > _MAX_JSON_BYTES:
            raise ValueError(f"{member.size} bytes")
        return json.loads(data[member.start : member.start + member.size])
    except (ValueError, RecursionError) as error:
        raise damaged(f"{where}: {shown(member.name)}", f"is not JSON ({error})") from None


def _label(note: object, member: Member, where: str) -> int:
    label = note.get("label") if isinstance(note, dict) else None
    if type(label) is not int or abs(label) >= 2**62:
        raise UserError(
            f'token shard {where}: {shown(member.name)} has no class: write a .cls member, or an integer "label"'
        )
    return label
