"""A run's folder of checkpoints: which are complete, which to keep, and whether one is intact.

checkpoints/step-00000400/   state-*.safetensors (one a rank), random-*.pt (one a data rank), megastar.json
checkpoints/latest           the name of the newest complete one
checkpoints/.writing/        one that is being written; it is renamed when it is complete
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megastar.config.schema import TrainConfig
from megastar.errors import UserError
from megastar.run_dir.layout import CHECKPOINTS, FORMAT, MANIFEST
from megastar.utils.files import sha256, sync_folder, write_atomic

WRITING = ".writing"
OLD = ".old"  # suffix of a checkpoint that a new one of the same step replaces
NAME = re.compile(r"step-\d{8}(\.old)?")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def folder_of(run: str | Path) -> Path:
    return Path(run) / CHECKPOINTS


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of ``folder``, oldest first, without half-written ones and a user's copies."""
    found = [p.parent for p in folder.glob(f"step-*/{MANIFEST}") if NAME.fullmatch(p.parent.name)]
    return sorted(found, key=lambda p: (step_in(p), not p.name.endswith(OLD)))


def step_in(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-").removesuffix(OLD))


def remove(checkpoint: Path) -> None:
    """Remove the manifest first: an interrupted removal leaves nothing that counts as complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of ``folder``, or None."""
    pointer = folder / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if NAME.fullmatch(name) and (folder / name / MANIFEST).is_file():
        return folder / name
    return next(reversed(complete(folder)), None)


def find_checkpoint(path: Path) -> Path:
    """A run folder, its checkpoints folder, or one checkpoint -> the checkpoint."""
    if (path / MANIFEST).is_file():
        return path
    for folder in (folder_of(path), path):
        if folder.is_dir() and (found := latest(folder)):
            return found
    raise UserError(f"no complete checkpoint in {path}: name a run folder or a folder step-*")


def publish(folder: Path, name: str, manifest: dict[str, Any], written: Path | None = None) -> Path:
    """Rename ``written`` (``.writing/name``) to ``name``, with its manifest, and only then update ``latest``."""
    written = written or folder / WRITING / name
    write_atomic(written / MANIFEST, json.dumps(manifest, indent=1).encode())
    before = folder / (name + OLD)
    if (folder / name).exists():  # the same step again, after a resume from an earlier one
        if before.exists():  # left by a killed save
            remove(before)
        (folder / name).rename(before)  # counts until the new one does
    written.rename(folder / name)
    sync_folder(folder)
    write_atomic(folder / "latest", f"{name}\n".encode())
    if before.exists():
        remove(before)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    return folder / name


def retire(train: TrainConfig, folder: Path) -> None:
    """Remove all but the last ``keep_last`` checkpoints, each ``keep_every``-th step, the best by validation loss, and the
    one that ``latest`` names."""
    found = complete(folder)
    keep = set(found[-max(1, train.keep_last) :]) | {latest(folder)}
    if train.keep_every:
        keep |= {p for p in found if step_in(p) % train.keep_every == 0}
    if train.keep_best:
        scores = {p: json.loads((p / MANIFEST).read_text()).get("val_loss_ar") for p in found}
        scored = [p for p in found if scores[p] is not None]
        keep |= set(sorted(scored, key=lambda p: scores[p])[:1])
    for old in set(found) - keep:
        remove(old)


def parse_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ``UserError`` where it is missing, damaged or of another format."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{checkpoint} is not a complete checkpoint: {MANIFEST} is missing; name a folder step-* of a run"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint} has format {manifest.get('format')}, this megastar reads {FORMAT}: use the version that wrote it"
        )
    return manifest


def read_manifest(checkpoint: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """``parse_manifest``, with a check of the names and sizes of the checkpoint's files (all, or ``names``)."""
    manifest = parse_manifest(checkpoint)
    for name in manifest["files"] if names is None else names:
        file, entry = checkpoint / name, manifest["files"][name]
        if not file.is_file():
            raise UserError(
                f"{checkpoint} lacks {name} ({entry['whose']}): restore it, or remove the folder to resume from an earlier one"
            )
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{file} is damaged: it has {file.stat().st_size} bytes, its manifest records {entry['bytes']}; restore it, or remove its folder"
            )
    return manifest


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files' hashes (all, or those of ``names``) with the manifest. Raises ``UserError`` for a damaged file."""
    names = names if names is None else list(names)
    files = read_manifest(checkpoint, names)["files"]
    for name in files if names is None else names:
        if sha256(checkpoint / name) != files[name]["sha256"]:
            raise UserError(
                f"{checkpoint / name} is damaged: its SHA-256 differs from the manifest's; restore it, or remove its folder"
            )
