"""Classes of images from the files beside them: ``KEY.cls``, ``KEY.label``, ``KEY.index``, or a field of ``KEY.json``.

A key is the name up to the first dot of the last path component, as in webdataset; suffixes are compared without regard
to letter case. Without the user's choice (``label_field``) a class is read from ``cls``, ``label`` or ``index``, if only
one of them is there. ``label_field`` is a suffix (``cls``), or a field of ``KEY.json`` (``label``, ``json.label``,
``json.meta.label``).
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from megastar.data.images.findings import Findings
from megastar.data.images.listing import CLASS_LIMIT, text
from megastar.errors import UserError
from megastar.utils.json_file import shown

AUTO = ("cls", "label", "index")  # read without being asked for
OTHERS = ("class", "labels", "idx", "target", "category", "json", "txt")  # may hold a class: the user chooses
_NUMBERS = ("cls", "index")  # hold integers; others may also hold a name
MOST_LABEL, MOST_JSON, MOST_NAME = 1 << 10, 1 << 20, 200  # bytes, bytes, characters
_FIELDS_SHOWN = 12


def key_and_suffix(name: bytes) -> tuple[bytes, str]:
    """``a/b.seg.PNG`` -> ``a/b``, ``seg.png``"""
    folder, slash, last = name.rpartition(b"/")
    stem, _, suffix = last.partition(b".")
    return folder + slash + stem, suffix.lower().decode("utf-8", "backslashreplace")


class Companions:
    """Collects the companions of the images of one tar or folder."""

    def __init__(self, label_field: str = ""):
        self.field = label_field
        self.suffix = "" if label_field.startswith("json.") else label_field.lower().removeprefix(".")
        self.path = [] if label_field.startswith(".") else label_field.removeprefix("json.").split(".")
        self._known = {*AUTO, *OTHERS, self.suffix} - {""}
        self._labels: dict[bytes, dict[str, str]] = {}  # key -> where from -> class
        self._there: dict[bytes, tuple[str, ...]] = {}  # key -> suffixes; equal tuples are one object
        self._tuples: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._words: dict[str, str] = {}
        self.json_fields: list[str] = []

    def knows(self, name: bytes) -> bool:
        """Whether the file ``name`` may be a companion."""
        key, suffix = key_and_suffix(name)
        return suffix in self._known and bool(key.rpartition(b"/")[2])

    def add(self, name: bytes, where: str, size: int, read: Callable[[int], bytes]) -> None:
        """Note the file ``name`` of ``size`` bytes; ``read(n)`` gives its first n bytes.

        Raises ``UserError`` for a class that cannot be read; ``where`` names the file.
        """
        key, suffix = key_and_suffix(name)
        there = (*(s for s in self._there.get(key, ()) if s != suffix), suffix)
        self._there[key] = self._tuples.setdefault(there, there)
        if suffix == self.suffix or (not self.field and suffix in AUTO):
            self._note(key, suffix, _class_in(read(min(size, MOST_LABEL + 1)), suffix, where))
        if suffix == "json" and self.suffix != "json" and (self.field or not self.json_fields):
            content = _object(read(size) if size <= MOST_JSON else b"", size, where)
            self.json_fields = self.json_fields or [shown(k, 40) for k in content][:_FIELDS_SHOWN]
            if self.field and self.path and (label := _class_of(content, self.path, where)) is not None:
                self._note(key, "json." + ".".join(self.path), label)

    def _note(self, key: bytes, origin: str, label: str) -> None:
        self._labels.setdefault(key, {})[self._words.setdefault(origin, origin)] = self._words.setdefault(label, label)

    def close(self, keys: Counter[bytes], found: Findings) -> Callable[[bytes], str | None]:
        """Count what the images with ``keys`` have into ``found``; returns key -> class or None."""
        companions, origins = Counter[str](), Counter[str]()
        for key, n in keys.items():
            for suffix in self._there.get(key, ()):
                companions[suffix] += n
            for origin in self._labels.get(key, ()):
                origins[origin] += n
        found.add(Findings(companions=dict(companions), label_from=dict(origins), json_fields=self.json_fields))
        return lambda key: next(iter(self._labels.get(key, {}).values()), None)


def parse_class(data: bytes, where: object) -> str:
    """The number of a class in ASCII, without leading zeros. Raises ``UserError``."""
    word = data.removeprefix(codecs.BOM_UTF8).strip()
    if not word.isdigit() or len(word) > 18 or int(word) >= CLASS_LIMIT:
        raise UserError(f"{where} holds {data[:20]!r}: write an integer class from 0 to {CLASS_LIMIT - 1}")
    return str(int(word))


def class_name(name: str, where: object) -> str:
    """``name`` as a class: a number without leading zeros, or a name. Raises ``UserError``."""
    name = name.strip()
    if not name or len(name) > MOST_NAME or not name.isprintable():
        raise UserError(
            f"{where} holds {name[:40]!r}, which is not a class: write a number, or a name of 1 to {MOST_NAME} characters"
        )
    return parse_class(name.encode(), where) if name.isascii() and name.isdigit() else name


def _class_in(data: bytes, suffix: str, where: str) -> str:
    if suffix in _NUMBERS:
        return parse_class(data, where)
    if len(data) > MOST_LABEL:
        raise UserError(f"{where} has more than {MOST_LABEL} bytes and cannot be a class: choose another --label-field")
    return class_name(text(data.removeprefix(codecs.BOM_UTF8)), where)


def _object(data: bytes, size: int, where: str) -> dict[str, Any]:
    if size > MOST_JSON:
        raise UserError(f"{where} has {size} bytes, more than the limit of {MOST_JSON} for a companion: shorten it")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({shown(str(error))}): correct or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds {shown(content)}, not an object with fields: correct or remove it")
    return content


def _class_of(content: Any, path: list[str], where: str) -> str | None:
    """The class in the field ``path``; None without the field."""
    for part in path:
        if not isinstance(content, dict) or (content := content.get(part)) is None:
            return None
    if isinstance(content, str):
        return class_name(content, f"{where}: {'.'.join(path)}")
    if type(content) is not int or not 0 <= content < CLASS_LIMIT:
        raise UserError(
            f"{where}: {'.'.join(path)} holds {shown(content)}: a class is an integer from 0 to {CLASS_LIMIT - 1}, or a name"
        )
    return str(content)
