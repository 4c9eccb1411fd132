"""A run's folder of checkpoints: which are complete, which to keep, and whether one is intact.

checkpoints/step-00000400/   state-*.safetensors (one a rank), random-*.pt (one a data rank), megastar.json
checkpoints/latest           the name of the newest complete one
checkpoints/.writing/        one that is being written; it is renamed when it is complete
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.config.schema import TrainConfig
from megastar.errors import UserError
from megastar.run_dir import manifest
from megastar.run_dir.layout import CHECKPOINTS, FORMAT, MANIFEST  # noqa: F401
from megastar.utils.files import read_small, sha256, sync_folder, write_atomic

WRITING = ".writing"
OLD = ".old"  # suffix of a checkpoint that a new one of the same step replaces
NAME = re.compile(r"step-[0-9]{8}(\.old)?")


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
    name = (read_small(folder / "latest", 100) or b"").decode(errors="replace").strip()
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


def publish(folder: Path, name: str, content: dict[str, Any], written: Path | None = None) -> Path:
    """Rename ``written`` (``.writing/name``) to ``name``, with its manifest ``content``, and only then update ``latest``."""
    written = written or folder / WRITING / name
    write_atomic(written / MANIFEST, json.dumps(content, indent=1).encode())
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


def retire(train: TrainConfig, folder: Path, used: Set[Path] = frozenset()) -> None:
    """Remove all but the last ``keep_last`` checkpoints, each ``keep_every``-th step, the best by validation loss, the
    one that ``latest`` names, and those ``used`` by an upload."""
    found = complete(folder)
    keep = set(found[-max(1, train.keep_last) :]) | {latest(folder), *used}
    if train.keep_every:
        keep |= {p for p in found if step_in(p) % train.keep_every == 0}
    if train.keep_best:
        scores: dict[Path, float] = {}
        for p in found:
            with suppress(UserError):  # a damaged one is not the best
                if (loss := manifest.load(p).get("val_loss_ar")) is not None and not math.isnan(loss):
                    scores[p] = loss
        scored = [p for p in found if p in scores]
        keep |= set(sorted(scored, key=lambda p: scores[p])[:1])
    for old in set(found) - keep:
        remove(old)


def parse_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ``UserError`` where it is missing, damaged or of another format."""
    if not (checkpoint / MANIFEST).exists():
        raise UserError(
            f"{checkpoint} is not a complete checkpoint: {MANIFEST} is missing; name a folder step-* of a run"
        )
    try:
        return manifest.load(checkpoint)
    except manifest.OtherFormat:
        raise
    except UserError as error:
        raise damaged(checkpoint, error) from error


def read_manifest(checkpoint: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """``parse_manifest``, with a check of the names and sizes of the checkpoint's files (all, or ``names``)."""
    content = parse_manifest(checkpoint)
    try:
        manifest.check_files(checkpoint, content, names)
    except UserError as error:
        raise damaged(checkpoint, error) from error
    return content


def damaged(checkpoint: Path, what: object) -> UserError:
    """The error for a checkpoint that cannot be used: it names an older usable one, and how to use it."""
    remedy = "restore it"
    if older := whole_before(checkpoint):
        aside = checkpoint.parent.parent / f"{checkpoint.name}.damaged"
        remedy += (
            f", or use the older checkpoint {older}, whose files are whole: name it in place of the run folder, or, to "
            f"resume training from it, run `mv {shlex.quote(str(checkpoint))} {shlex.quote(str(aside))}` and train again"
        )
    return UserError(f"{what}: {remedy}")


def whole_before(checkpoint: Path) -> Path | None:
    """The newest checkpoint before ``checkpoint`` in its folder whose manifest and file sizes are correct, or None."""
    if not NAME.fullmatch(checkpoint.name):
        return None
    for older in reversed(complete(checkpoint.parent)):
        if older.name != checkpoint.name and step_in(older) <= step_in(checkpoint):
            with suppress(UserError):
                manifest.check_files(older, manifest.load(older))
                return older
    return None


def verify(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files' hashes (all, or those of ``names``) with the manifest. Raises ``UserError`` for a damaged file."""
    names = names if names is None else list(names)
    files = read_manifest(checkpoint, names)["files"]
    for name in files if names is None else names:
        if sha256(checkpoint / name) != files[name]["sha256"]:
            raise damaged(checkpoint, f"{checkpoint / name} is damaged: its SHA-256 differs from the manifest's")
