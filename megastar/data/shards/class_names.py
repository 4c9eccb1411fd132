"""The names of classes: those that an option gives, as a file with one name per line or a set of token shards; and whether two
sets number them equally."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megastar.config.files import read_text
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError
from megastar.utils.json_file import shown
from megastar.utils.launcher import place_of

logger = logging.getLogger(__name__)
MOST_BYTES = 64 << 20  # of a file of class names


def read_class_names(path: str, sets: bool = False) -> list[str]:
    """The names by number. ``sets``: ``path`` may be a set of token shards, as a folder or s3:// URL. Raises ``UserError``."""
    if sets and ("://" in path or os.path.isdir(path)):
        return load_manifest(path).classes
    if not os.path.isfile(path):
        other = ", or a set of token shards" if sets else ""
        raise UserError(f"--classes {path} does not exist: name a file with one class name per line{other}")
    lines = [line.strip() for line in read_text(Path(path), MOST_BYTES).removesuffix("\n").split("\n")]
    if sets and "" in lines:
        raise UserError(f"--classes {path}: line {lines.index('') + 1} is blank: write one class name per line")
    return lines


def check_same_classes(first: object, names: Sequence[str], second: object, others: Sequence[str]) -> None:
    """Raise ``UserError`` if the sets (or weights) ``first`` and ``second`` give a number to different classes.

    One may have more classes than the other. Numbers in the place of names cannot be compared with names: a warning.
    """
    if difference := first_difference(names, others):
        number, one, other = difference
        plain = [all(name == str(i) for i, name in enumerate(found)) for found in (names, others)]
        if plain[0] != plain[1]:
            numbered, named = (first, second) if plain[0] else (second, first)
            if place_of(os.environ).rank == 0:
                logger.warning(
                    "%s has numbers instead of class names: they are taken as the numbers of the classes of %s",
                    numbered,
                    named,
                )
            return
        raise UserError(
            f"{first} and {second} number their classes differently: class {number} is {shown(one)!r} in the former and "
            f"{shown(other)!r} in the latter; pretokenize one of them again with --classes and the other set's folder"
        )


def first_difference(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """The first number that two lists give to different classes, and both names; None if the shorter begins the longer."""
    return next(((i, a, b) for i, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
