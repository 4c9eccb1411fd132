"""The folder of a set that is being made: ``OUT/.progress`` with the plan and a record of each finished shard."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megastar.data.shards.manifest import Manifest
from megastar.data.storage.shard_info import MANIFEST, ShardInfo
from megastar.errors import UserError
from megastar.utils.files import write_atomic
from megastar.utils.json_file import (
    ANY,
    FILE_NAME,
    SHA256,
    SchemaValidator,
    dict_of,
    integer,
    list_of,
    read_json,
    text,
    validator,
)
from megastar.utils.json_file import record as json_record

PROGRESS = ".progress"
_RECORD = validator(
    json_record(
        {
            "name": FILE_NAME,
            "samples": integer(),
            "bytes": integer(),
            "sha256": SHA256,
            "skipped": list_of(dict_of(text(), text())),
        }
    )
)


_PLAN = validator(dict_of(text(1000), ANY))


def is_finished(out: Path) -> bool:
    """Whether all shards of a set were made, and it was not begun again."""
    return (out / MANIFEST).is_file() and not (out / PROGRESS / "plan.json").is_file()


def check_unfinished(out: Path) -> None:
    """Raise ``FileNotFoundError`` if another process has finished the set, and so removed its plan."""
    if is_finished(out):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(out / PROGRESS / "plan.json"))


def read_plan(path: Path) -> dict[str, object]:
    """The settings of a set. Raises ``UserError``, and ``FileNotFoundError`` if another process has removed the file."""
    plan: dict[str, object] = _read(path, _PLAN, "remove it")
    return plan


def read_record(path: Path) -> tuple[ShardInfo, list[dict[str, str]]]:
    """A shard and its skipped images. Errors as ``read_plan``."""
    found = _read(path, _RECORD, "remove it and run the same command again")
    return ShardInfo(*(found[name] for name in ("name", "samples", "bytes", "sha256"))), found["skipped"]


def _read(path: Path, schema: SchemaValidator, remedy: str) -> Any:
    try:
        return read_json(path, schema, remedy)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise


def check_unrelated_files(out: Path) -> None:
    """Raise ``UserError`` for a folder that holds other things than a set of shards."""
    if not out.exists() or (out / PROGRESS / "plan.json").is_file() or (out / MANIFEST).is_file():
        return
    if unrelated := sorted(p.name for p in out.iterdir() if not p.name.startswith(PROGRESS)):
        raise UserError(f"{out} holds other files, for example {unrelated[0]!r}: give a new or an empty folder")


def is_complete(out: Path, info: ShardInfo) -> bool:
    try:
        return (out / info.name).stat().st_size == info.bytes
    except FileNotFoundError:
        return False


def reopen(out: Path, done: Manifest, missing: list[ShardInfo]) -> None:
    """Turn a finished set into an unfinished one. The manifest is kept until it is written again."""
    progress = out / PROGRESS
    progress.mkdir(exist_ok=True)
    for info in done.shards:
        if info not in missing:
            skipped = [s for s in done.skipped if s.get("shard") == info.name]
            record = json.dumps({**asdict(info), "skipped": skipped}).encode()
            write_atomic(progress / f"{Path(info.name).stem}.json", record)
    write_atomic(progress / "plan.json", (json.dumps(settings_of(done), indent=1) + "\n").encode())


def clear(out: Path) -> None:
    """Remove what only an unfinished set needs; atomically for the other processes, by a rename."""
    with suppress(FileNotFoundError):
        (out / PROGRESS).rename(out / f"{PROGRESS}.{os.urandom(4).hex()}")
    for folder in out.glob(f"{PROGRESS}.*"):
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in out.glob("*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)


def remove_empty(out: Path) -> None:
    with suppress(OSError):
        (out / PROGRESS).rmdir()
        out.rmdir()


def settings_of(m: Manifest) -> dict[str, object]:
    """What two runs must have in common to write the same shards."""
    names = hashlib.sha256("\n".join(m.classes).encode(errors="surrogatepass")).hexdigest()
    made_by = {k: v for k, v in m.made_by.items() if k != "class_source"}  # words; the digests are compared
    stored = {"features": m.features} if m.features else {}  # absent in the plans of versions that knew none
    return {
        "tokenizer": m.tokenizer_sha256,
        "crops": m.crops,
        "layout": m.layout,
        **stored,
        **made_by,
        "class_names": names,
    }


def check_settings(out: Path, there: dict[str, object], now: dict[str, object], old: bool) -> None:
    """Raise ``UserError`` for settings that differ. ``old``: the set was begun before the class was the top folder."""
    names = dict.fromkeys(k for k in [*there, *now] if k != "class_source")
    if "class_names" not in there:  # the plan of an older version; a manifest has the names
        names.pop("class_names", None)
    differ = [f"{k} ({there.get(k)!r} there, {now.get(k)!r} now)" for k in names if there.get(k) != now.get(k)]
    if not differ:
        return
    hint = ""
    if old and {k for k in names if there.get(k) != now.get(k)} <= {"pictures", "pictures_sha256", "class_names"}:
        hint = (
            ". It was begun by an older version, in which the class was the folder that holds the image (--class-level -1), "
            "numbers were sorted as strings and hidden files were read"
        )
    raise UserError(
        f"{out} holds token shards of other settings: {'; '.join(differ)}{hint}: choose another folder, or remove this one"
    )
