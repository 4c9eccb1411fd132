"""Checkpoints: written under a temporary name, listed in a manifest, renamed, and only then named by ``latest``.

checkpoints/step-00000400/   DeepSpeed's files, one random-state file a rank, megastar.json (sizes and hashes)
checkpoints/latest           the name of the newest complete one
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastar.config.schema import RunConfig
from megastar.engine.build import Context, Engines
from megastar.errors import UserError

WRITING = ".writing"
MANIFEST = "megastar.json"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def folder_of(cfg: RunConfig) -> Path:
    return Path(cfg.run) / "checkpoints"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of ``folder``, or None. A half-written one never counts."""
    pointer = folder / "latest"
    if pointer.is_file() and (folder / pointer.read_text().strip() / MANIFEST).is_file():
        return folder / pointer.read_text().strip()
    complete = sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}"))
    return complete[-1] if complete else None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
        os.fsync(f.fileno())
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _random_state(ctx: Context) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state()}  # all other draws are functions of the seed and the step
    if ctx.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ctx.device)
    return state


def needed_bytes(engines: Engines) -> int:
    """What this rank will write: fp32 master, two moments and the average (16 B an element) and the compute copy."""
    elements = sum(p.ds_tensor.numel() for p in engines.student.module.parameters())
    return elements * (16 + 4) + (1 << 20)


def save(cfg: RunConfig, ctx: Context, engines: Engines, step: int, state: dict[str, Any]) -> Path:
    """Save after ``step`` steps. Raises ``UserError`` when the disk is full; the former checkpoint stays valid.

    What rank 0 does alone (room, hashes, rename) is agreed before the others go on. A rank that fails inside
    DeepSpeed's save cannot agree, since the others wait in a barrier there: it ends, and the launcher ends them.
    """
    folder, name = folder_of(cfg), name_of(step)
    writing = folder / WRITING
    need = torch.tensor([needed_bytes(engines)], dtype=torch.int64, device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(need)

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if writing.exists():  # what a killed save left
            shutil.rmtree(writing)
        writing.mkdir()
        free = shutil.disk_usage(folder).free
        if free < need.item():
            raise OSError(f"{need.item() / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")

    def write() -> None:
        # DeepSpeed copies a recovery script beside the files; ours are converted by `megastar export`.
        engines.student._copy_recovery_script = lambda path: None
        engines.student.save_checkpoint(str(writing), tag=name, client_state={}, save_latest=False)
        torch.save(_random_state(ctx), writing / name / f"random_rank_{ctx.rank}.pt")

    def finish() -> None:
        files = sorted(p for p in (writing / name).iterdir() if p.is_file())
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(_digest, files))
        listed = {p.name: {"bytes": p.stat().st_size, "sha256": d} for p, d in zip(files, digests, strict=True)}
        about = {"format": 1, "step": step, "world": ctx.world, "dtype": str(ctx.dtype), **state}
        about |= {"config": asdict(cfg), "files": listed}
        _write_atomically(writing / name / MANIFEST, json.dumps(about, indent=1))
        if (folder / name).exists():  # the same step again, after a resume
            shutil.rmtree(folder / name)
        (writing / name).rename(folder / name)
        _write_atomically(folder / "latest", name + "\n")

    def told(problem: str) -> UserError:
        former = latest(folder)
        kept = f"{former} stays valid" if former else "there is no earlier checkpoint"
        return UserError(
            f"checkpoint of step {step} in {folder} could not be written ({problem}); {kept}: "
            "free some space and start again"
        )

    if problem := _main_only(ctx, prepare):
        raise told(problem)
    try:
        write()
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(w in str(error) for w in _WRITE_ERRORS):
            raise
        raise told(str(error)) from error
    _barrier(ctx)
    if problem := _main_only(ctx, finish):
        raise told(problem)
    if ctx.main:  # the checkpoint is complete: what cannot be tidied up is no reason to stop
        shutil.rmtree(writing, ignore_errors=True)
        retire(cfg, folder)
    return folder / name


_WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "No space left", "File too large", "write")  # of torch.save


def _main_only(ctx: Context, work: Callable[[], None]) -> str:
    """Run ``work`` on rank 0; every rank learns what went wrong on its disk, or the empty string."""
    problem = [""]
    if ctx.main:
        try:
            work()
        except OSError as error:
            problem = [str(error)]
    if ctx.world > 1:
        dist.broadcast_object_list(problem, src=0, device=ctx.device)
    return problem[0]


def retire(cfg: RunConfig, folder: Path) -> None:
    """Remove all but the last ``keep_last`` complete checkpoints and each ``keep_every``-th step."""
    complete = sorted(p.parent for p in folder.glob(f"step-*/{MANIFEST}"))
    for old in complete[: -max(1, cfg.train.keep_last)]:
        step = int(old.name.removeprefix("step-"))
        if not (cfg.train.keep_every and step % cfg.train.keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after its files were compared with it in name and size."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: {MANIFEST} is missing; name a folder step-* of a run")
    about = json.loads(path.read_text())
    for name, entry in about["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(
                f"{checkpoint} lacks {name}: restore it, or remove the folder to resume from an earlier one"
            )
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}: it is damaged"
            )
    return about


def verify(checkpoint: Path) -> None:
    """Compare every file's hash with the manifest; ``UserError`` names the damaged one."""
    for name, entry in read_manifest(checkpoint)["files"].items():
        _compare(checkpoint / name, entry)


def _compare(file: Path, entry: dict[str, Any]) -> None:
    if _digest(file) != entry["sha256"]:
        raise UserError(f"{file} is damaged: its SHA-256 differs from the manifest's; restore it, or remove its folder")


def newest(ctx: Context, folder: Path) -> Path | None:
    """``latest`` as rank 0 sees it, on every rank: views of a shared file system may differ for a while."""
    found = [latest(folder) if ctx.main else None]
    if ctx.world > 1:
        dist.broadcast_object_list(found, src=0, device=ctx.device)
    return found[0]


def load(ctx: Context, engines: Engines, checkpoint: Path) -> dict[str, Any]:
    """Restore everything from ``checkpoint``; returns its manifest.

    Raises ``UserError`` for another world size or dtype, and for files that are not what was written.
    """
    about = read_manifest(checkpoint)
    mine = (f"_rank_{ctx.rank}_", f"_rank_{ctx.rank}.pt")
    for name, entry in about["files"].items():  # the ranks share the hashing: each checks what it will read
        if any(m in name for m in mine) or ctx.main and "_rank_" not in name:
            _compare(checkpoint / name, entry)
    if about["world"] != ctx.world:
        raise UserError(
            f"{checkpoint} was written by {about['world']} ranks, this run has {ctx.world}: start it with {about['world']}"
        )
    if about["dtype"] != str(ctx.dtype):
        raise UserError(
            f"{checkpoint} holds {about['dtype']} states, this run computes in {ctx.dtype}: set train.dtype"
        )
    path, _ = engines.student.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise UserError(f"{checkpoint} could not be loaded: DeepSpeed found no states in it")
    engines.refresh_teacher()
    state = torch.load(checkpoint / f"random_rank_{ctx.rank}.pt", weights_only=True)
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], ctx.device)
    return about


def _barrier(ctx: Context) -> None:
    if ctx.world > 1:
        dist.barrier()
