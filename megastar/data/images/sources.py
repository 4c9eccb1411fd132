"""Lists the images of a source.

A source is one of

* a folder tree ``.../<class>/<name>.jpg`` (torchvision's ImageFolder), following links to folders;
* tars: one, a folder of them, or those below s3://bucket/prefix. Inside, ``<class>/<name>.jpg``, or ``<key>.jpg``
  beside ``<key>.cls`` (WebDataset), or images alone, whose class is the tar's name. A tar of such tars
  (ILSVRC2012_img_train.tar) is read in place;
* a list (.txt, .tsv, .lst): with ``path<TAB>class``, ``path class`` or ``path`` per line, relative to the list's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megastar.data.images.listing import Listing, ListingBuilder, Stamp, is_image, parse_label, stem_of, text
from megastar.data.images.tars import LocalTar, RemoteTar, RemoteTars, Report, add_tars
from megastar.errors import UserError
from megastar.utils.files import read_regular

LISTS = (".txt", ".tsv", ".lst", ".list")
_MOST_LABEL, _MOST_LIST = 1 << 10, 256 << 20  # bytes of a .cls file and of a list


def list_source(source: str | Path, remote: RemoteTars | None, report: Report = lambda _: None) -> Listing:
    """Find the images of ``source``. Raises ``UserError`` for a source that is missing, unknown or broken."""
    found = ListingBuilder()
    if remote is not None:
        found.stamps.extend(remote.stamps())
        remote.pin(found.stamps)
        add_tars(found, [RemoteTar(remote, name, size) for name, size, _ in found.stamps], report)
        return found.listing()
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"image source {path} does not exist: give a folder of images, a .tar, a folder of tars, or a list"
        )
    if path.is_file():
        if path.suffix in LISTS:
            _add_list(found, path)
        elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
            _add_local_tars(found, path.parent, [path], report)
        else:
            raise UserError(
                f"image source {path} is neither a folder nor a .tar file nor a list ({', '.join(LISTS)}): give one of these"
            )
    elif not path.is_dir():
        raise UserError(f"image source {path} is a device or pipe: give a folder of images, a .tar, or a list")
    elif local := sorted(path.glob("*.tar")):
        found.stamps.append(_stamp(path, path))
        _add_local_tars(found, path, local, report)
    else:
        below: list[Path] = []
        for n, (name, label) in enumerate(_walk(path, b"", found.stamps, below, ())):
            found.add(name, -1, -1, -1, label)
            if n % 10000 == 0:
                report(n)
        if not found.keys:
            _add_local_tars(found, path, below, report)
    return found.listing()


def is_current(listing: Listing, source: str | Path, remote: RemoteTars | None) -> bool:
    """Whether sizes, times and ETags of the source are those of the listing."""
    if remote is not None:
        return remote.stamps() == listing.stamps
    root = Path(source)
    root = root.parent if root.is_file() else root
    try:
        return all(_stamp(root, root / s[0]) == s for s in listing.stamps)
    except OSError:
        return False


def _stamp(root: Path, path: Path) -> Stamp:
    s = path.stat()
    return [os.path.relpath(path, root), s.st_size, s.st_mtime_ns]


def _walk(
    root: Path, below: bytes, stamps: list[Stamp], tars: list[Path], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[bytes, int]]:
    """(name, label) of the images in a tree; adds its stamps and tars. A folder is stamped before it is read."""
    folder = os.path.join(os.fsencode(root), below)
    s = os.stat(folder)
    if (s.st_dev, s.st_ino) in above:  # a link to a parent folder
        return
    stamps.append(_stamp(root, Path(os.fsdecode(folder))))
    with os.scandir(folder) as entries:
        here = sorted(entries, key=lambda e: e.name)
    names = {e.name for e in here if e.name.endswith(b".cls")}
    for entry in here:
        if entry.is_symlink() and not os.path.exists(entry.path):  # dangling, or a link to itself
            continue
        name = below + entry.name
        if entry.is_dir():
            yield from _walk(root, name + b"/", stamps, tars, (*above, (s.st_dev, s.st_ino)))
        elif is_image(entry.name) and entry.is_file():
            cls = stem_of(entry.name) + b".cls"
            path = os.path.join(folder, cls)
            yield (
                name,
                parse_label(read_regular(Path(os.fsdecode(path)), _MOST_LABEL), os.fsdecode(path))
                if cls in names
                else -1,
            )
        elif entry.name.endswith(b".tar") and entry.is_file():
            tars.append(root / os.fsdecode(name))


def _add_list(found: ListingBuilder, path: Path) -> None:
    found.stamps.append(_stamp(path.parent, path))
    rows: list[tuple[bytes, bytes | None]] = []
    for number, line in enumerate(read_regular(path, _MOST_LIST).splitlines(), 1):
        name, cls = line.strip(), None
        if not name or name.startswith(b"#"):
            continue
        if b"\t" in name:
            name, cls = (part.strip() for part in name.split(b"\t", 1))
        elif not is_image(name) and len(words := name.rsplit(None, 1)) == 2:
            name, cls = words
        if not is_image(name) or cls == b"":
            raise UserError(
                f"{path}, line {number}: {text(line)[:80]!r} is not an image path with or without a class: write path<TAB>class"
            )
        rows.append((os.path.normpath(name), cls))
    without = [name for name, cls in rows if cls is None]
    if 0 < len(without) < len(rows):
        raise UserError(
            f"{path}: {len(without)} of {len(rows)} lines have no class, the first is {text(without[0])!r}: give a class on every line or on none"
        )
    given = {cls for _, cls in rows if cls is not None}
    if all(cls.isdigit() for cls in given):
        numbers = {cls: parse_label(cls, path) for cls in given}
    else:
        found.classes.extend(sorted(map(text, given)))
        numbers = {cls: found.classes.index(text(cls)) for cls in given}
    for name, cls in rows:
        found.add(name, -1, -1, -1, -1 if cls is None else numbers[cls])


def _add_local_tars(found: ListingBuilder, root: Path, tars: Sequence[Path], report: Report) -> None:
    for tar in tars:
        if tar.name.endswith("gz"):
            raise UserError(f"{tar} is compressed and cannot be read by position: gunzip it first")
    found.stamps.extend(_stamp(root, tar) for tar in tars)
    add_tars(found, [LocalTar(tar, root) for tar in tars], report)
