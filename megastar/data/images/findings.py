"""What the listing of a source found besides images: companions, hidden files, links. Told to the user, never silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_KINDS = {  # kind -> what is counted
    "hidden": "hidden and system files and folders, ignored",
    "loops": "links to a folder above them, not followed",
    "dangling": "links that lead nowhere, ignored",
    "replaced": "members of tars that a later member of their name replaces",
    "repeated": "lines of the list that repeat an image and its class, ignored",
    "archives": "compressed archives, not read (unpack them)",
    "tars": "tars, not read because there are images outside them",
    "beside": "images outside the tars, not read",
    "deeper": "tars in deeper folders, not read",
    "special": "pipes, devices and sockets, ignored",
}
MOST_EMPTY = 1000


@dataclass
class Findings:
    """Of a scan of a source; stored with its listing."""

    label_field: str = ""  # the user's choice of a companion, see companions.py
    label_from: dict[str, int] = field(default_factory=dict)  # companion or field -> images that it labels
    companions: dict[str, int] = field(default_factory=dict)  # suffix of a companion -> images that have one
    json_fields: list[str] = field(default_factory=list)  # of the first KEY.json
    counts: dict[str, int] = field(default_factory=dict)  # of _KINDS
    examples: dict[str, str] = field(default_factory=dict)
    tar_names: list[str] = field(default_factory=list)  # tars whose names are the folders of the images in their root
    empty: list[str] = field(default_factory=list)  # folders of a tree without images
    outside: str = ""  # an image of a list that is not below the list's folder

    def count(self, kind: str, example: str, n: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + n
        self.examples.setdefault(kind, example)

    def add(self, other: Findings) -> None:
        """Add those of a part of the source."""
        for mine, theirs in ((self.label_from, other.label_from), (self.companions, other.companions)):
            mine.update(Counter(mine) + Counter(theirs))
        for kind, n in other.counts.items():
            self.count(kind, other.examples[kind], n)
        self.json_fields = self.json_fields or other.json_fields
        self.tar_names += other.tar_names

    def sentences(self) -> list[str]:
        return [f"{_KINDS[k]}: {n}, for example {self.examples[k]!r}" for k, n in self.counts.items() if k in _KINDS]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
