"""Every output path of a command, checked in one place before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megastar.errors import UserError
from megastar.utils.files import check_output

Outputs = Mapping[str, str | Path | None]  # option, or "field =" of a configuration -> path, if it is given


def check_outputs(files: Outputs, *inputs: str | Path | None, folders: Outputs | None = None) -> None:
    """``check_output`` of each file and folder; two may not be the same, and none may be one of ``inputs``.

    Raises ``UserError`` for the first that cannot be written: what is wrong, its path and what to do. Leaves no file.
    """
    seen: dict[str, str] = {}
    for folder, outputs in ((False, files), (True, folders or {})):
        for name, path in outputs.items():
            if path is None or (folder and not str(path)):
                continue
            check_output(Path(path), name, inputs, folder)
            if (other := seen.setdefault(os.path.realpath(path), name)) != name:
                what = "folders" if folder else "files"
                raise UserError(f"{other} and {name} both name {path}: give two {what}")
