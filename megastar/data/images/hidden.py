"""Files and folders that operating systems and programs put beside images: they are never images of a data set."""

from __future__ import annotations

# macOS archives, Synology's thumbnails, Windows' and Linux' system folders; names that begin with a dot (._0.png, .DS_Store,
# .ipynb_checkpoints, .git) are hidden everywhere.
SYSTEM = frozenset(
    (b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found", b"Thumbs.db", b"desktop.ini")
)


def is_hidden(part: bytes) -> bool:
    """Whether one component of a path is hidden."""
    return (part.startswith(b".") and part not in (b".", b"..")) or part in SYSTEM


def in_hidden(name: bytes) -> bool:
    """Whether any component of the path ``name`` is hidden."""
    return any(map(is_hidden, name.split(b"/")))


def is_sidecar(name: bytes) -> bool:
    """Whether a path that the user wrote names a macOS side file or a file in a system folder.

    Other hidden folders may be meant: ``~/.cache/images`` is a place like any other.
    """
    *folders, last = name.split(b"/")
    return last.startswith(b"._") or last in SYSTEM or any(f in SYSTEM or f == b".ipynb_checkpoints" for f in folders)
