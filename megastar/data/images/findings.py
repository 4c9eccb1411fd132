"""What the listing of a source found besides images: companions, hidden files, links. Told to the user, never silent."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_KINDS = {  # kind -> sentence; counts and an example are filled in
    "hidden": "{n} hidden or system files and folders were ignored, such as {example}",
    "loops": "{n} links to a folder above them were not followed, such as {example}",
    "dangling": "{n} links lead nowhere and were ignored, such as {example}",
    "replaced": "{n} members of tars occur twice and the last one was used, such as {example}",
    "repeated": "{n} lines of the list repeat an image and its class and were ignored, such as {example}",
    "archives": "{n} compressed archives were not read, such as {example}: unpack them",
    "tars": "{n} tars were not read, because there are images outside them, such as the tar {example}",
    "beside": "{n} images outside the tars were not read, such as {example}",
    "deeper": "{n} tars in deeper folders were not read, such as {example}",
    "special": "{n} pipes, devices and sockets were ignored, such as {example}",
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
        return [_KINDS[k].format(n=n, example=repr(self.examples[k])) for k, n in self.counts.items() if k in _KINDS]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
