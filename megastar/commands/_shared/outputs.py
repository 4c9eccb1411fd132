"""Every output path of a command, checked in one place before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megastar.errors import UserError
from megastar.utils.files import check_output

if TYPE_CHECKING:
    from megastar.config.schema import RunConfig

COMPARISON = "compare.yaml"  # in the folder of a comparison
Outputs = Mapping[str, str | Path | None]  # option, or "field =" of a configuration -> path, if it is given


def run_folders(cfg: RunConfig) -> dict[str, str | Path | None]:
    """The folders that a training writes: the run's, and that of its checkpoints, which may be on another disk.

    Checkpoints of an earlier start are not checked: a resumed run retries its saves, and a finished one writes none.
    """
    from megastar.run_dir.checkpoint_dir import folder_of, latest

    saved = folder_of(cfg.run)
    begun = os.path.isdir(saved) and latest(saved) is not None
    return {"run =": cfg.run, "the checkpoints of run =": None if begun else saved}


def check_outputs(files: Outputs, *inputs: str | Path | None, folders: Outputs | None = None) -> None:
    """``check_output`` of each file and folder; two may not be the same, and none may be one of ``inputs``, or a file that
    a run, a comparison or a set of shards among them is read from.

    Raises ``UserError`` for the first that cannot be written: what is wrong, its path and what to do. Leaves no file.
    """
    seen: dict[str, str] = {}
    read = [*inputs, *(Path(i) / name for i in inputs if i and os.path.isdir(i) for name in _records(Path(i)))]
    for folder, outputs in ((False, files), (True, folders or {})):
        for name, path in outputs.items():
            if path is None or (folder and not str(path)):
                continue
            check_output(Path(path), name, read, folder)
            if (other := seen.setdefault(os.path.realpath(path), name)) != name:
                what = "folders" if folder else "files"
                raise UserError(f"{other} and {name} both name {path}: give two {what}")


def _records(folder: Path) -> tuple[str, ...]:
    """Names of the files that a folder is read from, besides weights and shards."""
    from megastar.data.storage.shard_info import MANIFEST
    from megastar.run_dir import events, layout, tokenizer_run

    of_run = layout.CONFIG, layout.METRICS, events.NAME, layout.EVALUATIONS, layout.ROLLBACKS, layout.LOST
    names = (*of_run, layout.TRACKERS, layout.LEASE, tokenizer_run.STATE, layout.MANIFEST, MANIFEST, COMPARISON)
    return (*names, "results.json") if (folder / COMPARISON).is_file() else names
