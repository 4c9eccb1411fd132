"""Lists the images, tars and companions of a folder tree, following links to folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megastar.data.images.companions import MOST_JSON, Companions, key_and_suffix
from megastar.data.images.findings import MOST_EMPTY, Findings
from megastar.data.images.hidden import is_hidden
from megastar.data.images.listing import ListingBuilder, Stamp, is_image, text
from megastar.errors import UserError
from megastar.utils.files import read_regular

TARS = (".tar",)
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_MOST_PATHS = 1000  # by which links lead to one folder: nested links multiply
_Ids = tuple[tuple[int, int], ...]  # device and inode of the folders above


class Tree:
    """The content of the folder ``root``. Images are added to ``found``. Raises ``UserError``."""

    def __init__(self, root: Path, found: ListingBuilder, report: Callable[[int], None]):
        self.root, self.found, self.report = root, found, report
        self.notes: Findings = found.findings
        self.tars: list[Path] = []
        self._folders: list[bytes] = []
        self._visits = Counter[tuple[int, int]]()
        self._todo: list[tuple[bytes, _Ids]] = [(b"", ())]
        while self._todo:
            below, above = self._todo.pop()
            try:
                self._visit(below, above)
            except OSError as error:
                raise UserError(
                    f"folder {root / text(below)} cannot be read ({error.strerror}): make it readable, or move it out of the source"
                ) from error
        full = set[bytes]()
        for folder in found.folders:
            while folder and folder not in full:
                full.add(folder)
                folder = folder.rpartition(b"/")[0]
        self.notes.empty = [text(f) for f in sorted(self._folders) if f not in full][:MOST_EMPTY]

    def _visit(self, below: bytes, above: _Ids) -> None:
        """Add the images in the folder ``below``, which is stamped before it is read."""
        folder = os.path.join(os.fsencode(self.root), below)
        s = os.stat(folder)
        if (identity := (s.st_dev, s.st_ino)) in above:
            self.notes.count("loops", text(below.rstrip(b"/")))
            return
        self.found.stamps.append(stamp(self.root, Path(os.fsdecode(folder))))
        with os.scandir(folder) as entries:
            here = sorted(entries, key=lambda e: e.name)
        self._visits[identity] += 1
        if self._visits[identity] > _MOST_PATHS:
            raise UserError(f"links lead to {text(folder)} by more than {_MOST_PATHS} paths: remove some of them")
        if below:
            self._folders.append(below.rstrip(b"/"))
        files, companions = list[bytes](), Companions(self.notes.label_field)
        folders: list[tuple[bytes, _Ids]] = []
        for entry in here:
            name, lower = below + entry.name, text(entry.name).lower()
            if is_hidden(entry.name):
                self.notes.count("hidden", text(name))
            elif lower.endswith(".cls"):  # whatever is in its place, reading it reports it
                if companions.knows(entry.name):
                    companions.add(name, text(entry.path), *_content(entry))
            elif entry.is_symlink() and not os.path.exists(entry.path):  # also a link to itself
                self.notes.count("dangling", text(name))
            elif entry.is_dir():
                folders.append((name + b"/", (*above, identity)))
            elif companions.knows(entry.name):
                companions.add(name, text(entry.path), *_content(entry))
            elif not (is_image(entry.name) or lower.endswith((*TARS, *ARCHIVES))):
                continue
            elif not entry.is_file():
                self.notes.count("special", text(name))
            elif is_image(entry.name):
                files.append(name)
            elif lower.endswith(TARS):
                self.tars.append(self.root / os.fsdecode(name))
            else:
                self.notes.count("archives", text(name))
        self._todo.extend(reversed(folders))
        keys = {name: key_and_suffix(name)[0] for name in files}
        value_of = companions.close(Counter(keys.values()), self.notes)
        for name in files:
            self.found.add(name, -1, -1, -1, value_of(keys[name]))
            if len(self.found.keys) % 10000 == 1:
                self.report(len(self.found.keys) - 1)


def _content(entry: os.DirEntry[bytes]) -> tuple[int, Callable[[int], bytes]]:
    """Size of a file, and a function that reads its first bytes."""
    path, size = Path(os.fsdecode(entry.path)), 0
    with suppress(OSError):  # a dangling link
        size = entry.stat().st_size
    return size, lambda n: read_regular(path, MOST_JSON)[:n]


def stamp(root: Path, path: Path) -> Stamp:
    """What changes with the file or folder ``path``."""
    s = path.stat()
    return [os.path.relpath(path, root), s.st_size, s.st_mtime_ns]
