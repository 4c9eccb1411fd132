"""The classes of a source's images: their numbers, names and origin.

Without a choice of the user, the class is that in a companion or list, else the top folder, as in torchvision's
ImageFolder. Where that is one of several readings, ``UserError`` names them and the option that chooses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megastar.data.images.companions import AUTO, OTHERS
from megastar.data.images.findings import Findings
from megastar.data.images.listing import CLASS_LIMIT, Listing, key_of
from megastar.errors import UserError

INNERMOST = -1  # class level: the folder that holds the image, as in versions up to 0.2.0
SPLITS = frozenset(
    [
        "train",
        "training",
        "val",
        "valid",
        "validation",
        "test",
        "testing",
        "dev",
        "eval",
        "evaluation",
        "holdout",
        "train2017",
        "val2017",
        "test2017",
    ]
)
_WORDNET = re.compile(r"n\d{8}")  # ImageNet's class tars end in numbers too


@dataclass(frozen=True)
class Choice:
    """What the user has set. ``level``: of folders, below the subset; ``field``: see companions.py; ``names``: the
    classes by number, from the file or set ``names_from``."""

    level: int | None = None
    field: str = ""
    names: Sequence[str] = ()
    names_from: str = ""

    def __post_init__(self) -> None:
        if self.level is not None and not -1 <= self.level <= 100:
            raise UserError(f"--class-level {self.level}: give 1 for the top folder, 2 for the next, ..., or -1, or 0")
        if self.level is not None and self.field:
            raise UserError(f"--class-level {self.level} and --label-field {self.field} exclude each other: give one")
        if self.field in ("json", ".json", "json.", "."):
            raise UserError(f"--label-field {self.field}: name a field of KEY.json, as json.label")
        if self.names and len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise UserError(f"{self.names_from} names the class {twice!r} twice: name each class once")


DEFAULT = Choice()


@dataclass(frozen=True)
class Classes:
    """``labels`` (n,) int64 of the selected images; ``names`` by number; ``source``: where they are from, in words."""

    labels: np.ndarray
    names: list[str]
    source: str
    notes: list[str] = field(default_factory=list)


def find_classes(listing: Listing, rows: np.ndarray, where: str, subset: str, choice: Choice) -> Classes:
    """The classes of the images ``rows``, numbered over the whole source, so that subsets agree. Raises ``UserError``."""
    found = listing.findings
    if choice.level is None:
        _check_companions(found, where, choice)
        if found.label_from:
            return _labelled(listing, rows, where, choice)
    return _Folders(listing, rows, where, subset, choice).classes()


# Companions and lists ------------------------------------------------------------------------------------------------
def _check_companions(found: Findings, where: str, choice: Choice) -> None:
    """Raise ``UserError`` where the class could be read from several places, or is not read from where it may be."""
    there = f"{where} has images with {_listed(found)}"
    if choice.field:
        if "list" in found.label_from:
            raise UserError(f"--label-field {choice.field}: the list {where} has the classes itself: omit the option")
        if not found.label_from:
            raise UserError(
                f"--label-field {choice.field}: no image of {where} has such a companion or field"
                + (f", but {_listed(found)}" if found.companions else "")
            )
        if len(found.label_from) > 1:
            both = " and ".join(sorted(found.label_from))
            raise UserError(
                f"--label-field {choice.field}: {where} has both {both}: give .{choice.field} for the companion, json.{choice.field} for the field"
            )
        return
    if len(found.label_from) > 1:
        raise UserError(f"{there}: choose the class with --label-field {' or '.join(sorted(found.label_from))}")
    if not found.label_from and (unread := [s for s in OTHERS if s in found.companions]):
        example = f"json.{next(iter(found.json_fields), 'FIELD')}" if unread == ["json"] else unread[0]
        raise UserError(
            f"{there}, which may hold their classes: choose with --label-field (as {example}), or --class-level 1 for the top folder"
        )


def _listed(found: Findings) -> str:
    """The companions, in words: ``.json (fields a, b), .txt``."""
    words = []
    for suffix in sorted(found.companions, key=lambda s: (s not in AUTO, s)):
        fields = f" (fields {', '.join(found.json_fields)})" if suffix == "json" and found.json_fields else ""
        words.append(f".{suffix}{fields}")
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _labelled(listing: Listing, rows: np.ndarray, where: str, choice: Choice) -> Classes:
    found = listing.findings
    origin = next(iter(found.label_from))
    word = f"class in {origin}" if origin == "list" else f"field {origin.removeprefix('json.')!r} of KEY.json"
    word = word if origin == "list" or origin.startswith("json.") else f".{origin}"
    given = listing.label[rows]
    if len(bad := rows[given < 0]):
        first = key_of(listing.name(int(bad[0])))
        raise UserError(
            f"{where}: {len(bad)} of {len(rows)} images have no {word}, the first is {first!r}: label all or none"
        )
    values = listing.values
    source = "list file" if origin == "list" else f"KEY.{origin}" if word.startswith(".") else word
    unread = [f".{s}" for s in sorted(found.companions) if s not in (origin, origin.partition(".")[0])]
    notes = [f"companions {', '.join(unread)} were not read"] if unread else []
    digits = [v.isascii() and v.isdigit() for v in values]  # "²" and the digits of other scripts are names
    numbers = [int(v) for v in values] if all(digits) else None
    if numbers is None and any(digits):
        name, number = values[digits.index(False)], values[digits.index(True)]
        notes.append(f"classes are names, among them {name!r} and the number {number!r}")
    if numbers is not None:
        highest = max(numbers)
        names = list(choice.names) or [str(i) for i in range(highest + 1)]
        if highest >= len(names):
            raise UserError(
                f"{where} has class {highest}, but {choice.names_from} names {len(names)} classes, 0 to {len(names) - 1}: add names"
            )
        source += f", names of {choice.names_from}" if choice.names else ", numbers"
        return Classes(np.array(numbers)[given], names, source, notes)
    names, order = _order(values, where, choice)
    index = {name: i for i, name in enumerate(names)}
    return Classes(np.array([index[v] for v in values])[given], names, f"{source}, {order}", notes)


def _order(used: Sequence[str], where: str, choice: Choice) -> tuple[list[str], str]:
    """The names by number, and their order in words: the user's; of numbers, numeric; else that of the strings."""
    if choice.names:
        if unknown := sorted(set(used) - set(choice.names)):
            raise UserError(
                f"{where} has {len(unknown)} classes that {choice.names_from} does not name, such as {unknown[0]!r}: add them, or remove their images"
            )
        return list(choice.names), f"names and order of {choice.names_from}"
    if all(re.fullmatch("[0-9]+", name) for name in used):
        return sorted(used, key=lambda name: (int(name), name)), "in numeric order, because all names are numbers"
    return sorted(used), "in string order"


# Folders -------------------------------------------------------------------------------------------------------------
class _Folders:
    """The classes of images by folders. A folder's parts are its components below the subset."""

    def __init__(self, listing: Listing, rows: np.ndarray, where: str, subset: str, choice: Choice):
        self.listing, self.rows, self.where, self.subset, self.choice = listing, rows, where, subset, choice
        self.depth = len(subset.split("/")) if subset else 0
        self.parts = [[p for p in f.split("/") if p not in ("", ".", "..")][self.depth :] for f in listing.folders]
        self.used = np.unique(listing.folder[rows])  # indices of folders with selected images
        self.level = 1 if choice.level is None else choice.level

    def classes(self) -> Classes:
        if self.level == 0:
            name = self.subset.rpartition("/")[2] or "all"
            names, order = _order([name], self.where, self.choice)
            label = np.full(len(self.rows), names.index(name), np.int64)
            return Classes(label, names, "one class for all images (class level 0)")
        if self.choice.level is None:
            self._check_readings()
        self._check_loose()
        names, order = _order(sorted({n for p in self.parts if (n := self._name(p))}), self.where, self.choice)
        if len(names) > CLASS_LIMIT:
            raise UserError(f"{self.where} has {len(names)} classes, more than {CLASS_LIMIT}: check --class-level")
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index.get(self._name(p) or "", -1) for p in self.parts], np.int64)
        level = "innermost folder" if self.level == INNERMOST else f"folder level {self.level}"
        source = f"{level} below {self.subset}" if self.subset else level
        return Classes(labels[self.listing.folder[self.rows]], names, f"{source}, {order}", self._notes())

    def _name(self, parts: list[str]) -> str | None:
        if self.level == INNERMOST:
            return parts[-1] if parts else None
        return parts[self.level - 1] if len(parts) >= self.level else None

    def _check_readings(self) -> None:
        """Raise ``UserError`` where the top folders are probably no classes."""
        found, names = self.listing.findings, {self.parts[f][0] for f in self.used if self.parts[f]}
        deeper = {self.parts[f][1] for f in self.used if len(self.parts[f]) > 1}
        if found.outside:
            raise UserError(
                f"{self.where}, {found.outside} is not below the list's folder, so its top folder is unclear: give the classes in the list, or --class-level (-1: the folder that holds the image)"
            )
        if names and not self.subset and {n.lower() for n in names} <= SPLITS:
            first = sorted(names)[0]
            below = " with the folders in it as classes" if deeper else ""
            raise UserError(
                f"{self.where}: the top folders are splits ({', '.join(sorted(names))}): use one of them with --subset {first}{below}, or set --class-level (1: {len(names)} classes, the top folders"
                + (f"; 2: {len(deeper)} classes, the folders in them)" if deeper else ")")
            )
        if len(names) == 1 and (level := self._first_level_with_several()):
            inside = "/".join([self.subset] * bool(self.subset) + self.parts[self.used[0]][: level - 1])
            count = len({self.parts[f][level - 1] for f in self.used})
            raise UserError(
                f"{self.where}: all images are in the folder {inside!r}: use the {count} folders in it as classes with --subset {inside} or --class-level {level}, or set --class-level 1 for one class"
            )
        stems = [t.split("/")[self.depth :] for t in found.tar_names if f"{t}/".startswith(self._prefix())]
        shards = [t[0] for t in stems if len(t) == 1]
        if shards and _numbered(shards):
            raise UserError(
                f"{self.where}: the images have no folder and no companion with a class, and the tars have the names of shards, such as {shards[0]!r}: give --class-level 0 for one class, or --class-level 1 to use the names of the tars as classes"
            )

    def _first_level_with_several(self) -> int:
        """The first level at which all images have a folder, and not all the same; 0 if there is none."""
        for level in range(2, 1 + min(len(self.parts[f]) for f in self.used)):
            if len({self.parts[f][level - 1] for f in self.used}) > 1:
                return level
        return 0

    def _check_loose(self) -> None:
        outside = [f for f in self.used if self._name(self.parts[f]) is None]
        loose = self.rows[np.isin(self.listing.folder[self.rows], outside)]
        if not len(loose):
            return
        first = key_of(self.listing.name(int(loose[0])))
        level = "a class folder" if self.level in (1, INNERMOST) else f"a folder of level {self.level}"
        if len(loose) < len(self.rows):
            raise UserError(
                f"{self.where}: image {first!r} is not in {level}, but other images are ({len(loose)} of {len(self.rows)} are not): move or remove them"
            )
        below = f" below {self.subset}" if self.subset else ""
        raise UserError(
            f"{self.where}: no image is in {level}{below}, the first is {first!r}: make one folder per class, or give --class-level 0 for one class of all images"
        )

    def _notes(self) -> list[str]:
        notes = []
        if found := self.listing.findings.label_from:
            notes.append(f"the classes in {' and '.join(sorted(found))} were not used, because --class-level is set")
        deeper = np.array([len(p) > self.level > 0 for p in self.parts], bool)[self.listing.folder[self.rows]]
        if deeper.any():
            next_level = {p[self.level] for p in map(self.parts.__getitem__, self.used) if len(p) > self.level}
            notes.append(
                f"images in folders below level {self.level}, whose class is that of level {self.level}: {int(deeper.sum())} of {len(self.rows)} (names at level {self.level + 1}: {len(next_level)})"
            )
        if self.level not in (0, 1):
            paths: dict[str, set[str]] = {}
            for p in map(self.parts.__getitem__, self.used):
                stem = p if self.level == INNERMOST else p[: self.level]
                paths.setdefault(stem[-1], set()).add("/".join(stem))
            if merged := sorted(name for name, where in paths.items() if len(where) > 1):
                notes.append(
                    f"names in several folders, one class each: {len(merged)}, for example {merged[0]!r} of {', '.join(sorted(paths[merged[0]])[:3])}"
                )
        empty = [e.split("/")[self.depth :] for e in self.listing.findings.empty if f"{e}/".startswith(self._prefix())]
        if names := sorted({e[self.level - 1] for e in empty if self.level > 0 and len(e) == self.level}):
            notes.append(f"folders without images, which are no classes: {len(names)}, for example {names[0]!r}")
        return notes

    def _prefix(self) -> str:
        return f"{self.subset}/" if self.subset else ""


def _numbered(names: Sequence[str]) -> bool:
    """Whether the names are those of shards: equal but for a number at the end."""
    last = [n.rpartition("/")[2] for n in names]
    if all(_WORDNET.fullmatch(n) for n in last):
        return False
    matches = [re.fullmatch(r"(.*?)(\d+)", n) for n in last]
    return all(matches) and len({m[1] for m in matches if m}) == 1
