"""The names of classes that an option gives: a file with one name per line, or a set of token shards."""

from __future__ import annotations

import os
from pathlib import Path

from megastar.config.files import read_text
from megastar.data.shards.manifest import load_manifest
from megastar.errors import UserError

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
