"""Lists the images of a source.

A source is one of

* a folder tree ``<class>/.../<name>.jpg`` (torchvision's ImageFolder), following links to folders;
* tars: one, a folder of them, or those below s3://bucket/prefix. Inside, ``<class>/<name>.jpg``, or ``<key>.jpg``
  beside ``<key>.cls`` (WebDataset, see companions.py), or images alone, whose folder is the tar's name. A tar of such
  tars (ILSVRC2012_img_train.tar) is read in place;
* a list (.txt, .tsv, .lst), see lists.py.
Hidden files and folders are ignored everywhere (hidden.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megastar.data.images.listing import Listing, ListingBuilder, text
from megastar.data.images.lists import LISTS, add_list
from megastar.data.images.tars import LocalTar, RemoteTar, RemoteTars, Report, add_tars
from megastar.data.images.tree import ARCHIVES, Tree, stamp
from megastar.errors import UserError


def list_source(
    source: str | Path, remote: RemoteTars | None, report: Report = lambda _: None, label_field: str = ""
) -> Listing:
    """Find the images of ``source``, and their classes in companions (``label_field``: see companions.py).

    Raises ``UserError`` for a source that is missing, unknown or broken.
    """
    found = ListingBuilder()
    found.findings.label_field = label_field
    if remote is not None:
        found.stamps.extend(remote.stamps(found.findings))
        remote.pin(found.stamps)
        add_tars(found, [RemoteTar(remote, name, size) for name, size, _ in found.stamps], report)
        return found.listing()
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"image source {path} does not exist: give a folder of images, a .tar, a folder of tars, or a list"
        )
    if path.is_file():
        if path.suffix.lower() in LISTS:
            found.stamps.append(stamp(path.parent, path))
            add_list(found, path)
        elif path.name.lower().endswith(".tar"):
            _add_local_tars(found, path.parent, [path], report)
        elif path.name.lower().endswith(ARCHIVES):
            remedy = "gunzip" if path.name.lower().endswith((".gz", ".tgz")) else "unpack"
            raise UserError(f"{path} is compressed and cannot be read by position: {remedy} it first")
        else:
            raise UserError(
                f"image source {path} is neither a folder nor a .tar file nor a list ({', '.join(LISTS)}): give one of these"
            )
    elif not path.is_dir():
        raise UserError(f"image source {path} is a device or pipe: give a folder of images, a .tar, or a list")
    else:
        _add_folder(found, path, report)
    return found.listing()


def is_current(listing: Listing, source: str | Path, remote: RemoteTars | None, label_field: str = "") -> bool:
    """Whether sizes, times and ETags of the source are those of the listing, and its classes are of ``label_field``."""
    if listing.findings.label_field != label_field:
        return False
    if remote is not None:
        return remote.stamps() == listing.stamps
    root = Path(source)
    root = root.parent if root.is_file() else root
    try:
        return all(stamp(root, root / s[0]) == s for s in listing.stamps)
    except OSError:
        return False


def _add_folder(found: ListingBuilder, path: Path, report: Report) -> None:
    """Tars in the folder itself are the source; else the images below it; else the tars below it."""
    content = ListingBuilder()
    content.findings.label_field = found.findings.label_field
    tree = Tree(path, content, report)
    top = [tar for tar in tree.tars if tar.parent == path]
    tars, images = top or ([] if content.keys else tree.tars), len(content.keys)
    if not tars:
        vars(found).update(vars(content))
        if tree.tars:
            found.findings.count("tars", text(os.fsencode(tree.tars[0].relative_to(path))), len(tree.tars))
        return
    found.stamps.extend(content.stamps)
    for kind, n in content.findings.counts.items():
        found.findings.count(kind, content.findings.examples[kind], n)
    if images:
        first = content.keys[0] + content.suffixes[0]
        found.findings.count("beside", text(first), images)
    if others := [tar for tar in tree.tars if tar not in set(tars)]:
        found.findings.count("deeper", text(os.fsencode(others[0].relative_to(path))), len(others))
    _add_local_tars(found, path, sorted(tars), report)


def _add_local_tars(found: ListingBuilder, root: Path, tars: Sequence[Path], report: Report) -> None:
    found.stamps.extend(stamp(root, tar) for tar in tars)
    add_tars(found, [LocalTar(tar, root) for tar in tars], report)
