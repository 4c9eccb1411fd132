"""Drawing a plan's pictures: in memory, into files that several processes share, or straight into a score."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch.distributed as dist
    from rich.console import Console

    from megastar.sampling.distributed import SamplingPipeline

SHOWN_CLASSES = 16  # a thousand classes make no picture that anyone looks at


def shown_pictures(labels: list[int], columns: int) -> list[int]:
    """Numbers of the grid's pictures: the first ``columns`` of each of the first classes."""
    shown = set(sorted(set(labels))[:SHOWN_CLASSES])
    counts, out = dict.fromkeys(shown, 0), []
    for i, c in enumerate(labels):
        if c in shown and counts[c] < columns:
            counts[c] += 1
            out.append(i)
    return out


def draw_to_files(
    painter: SamplingPipeline,
    a: argparse.Namespace,
    origin: dict[str, Any],
    place: tuple[int, int],
    columns: int,
    console: Console,
) -> dict[int, np.ndarray]:
    """This rank's part of --npz and --folder; rank 0 joins the parts. Returns the grid's pictures, on rank 0.

    Beside the .npz lies its record: the same command again finds that it is done, another one is refused.
    """
    import shutil

    from megastar.sampling import distributed
    from megastar.sampling.npz import read_npz, record_of, write_record

    (rank, world), npz = place, a.npz
    identity, about = record(painter, origin)
    beside = record_of(npz) if npz else None
    if npz and npz.exists():
        if not beside.is_file():
            raise UserError(f"{npz} exists and {beside} does not say of what: name another file, or remove it")
        distributed.check_plan(beside, identity)
        console.print(f"{npz} is there already", markup=False, highlight=False)
        return {}
    folder = a.folder or npz.with_name(npz.name + ".parts")
    if rank == 0:
        check_room(painter, folder, 1 + bool(npz))
    distributed.open_folder(folder, identity, about)
    if rank and npz and npz.exists():  # rank 0 has joined the parts while this process was starting
        return {}
    try:
        distributed.sample_folder(painter, folder, rank=rank, world=world, console=console if rank == 0 else None)
    except FileNotFoundError:
        if rank and not folder.exists():  # rank 0 has joined and removed the parts
            return {}
        raise
    if rank:
        return {}
    wanted = shown_pictures(painter.labels, columns)
    some, chunk, pictures = {}, -1, None
    for i in wanted:
        if i // painter.batch != chunk:
            chunk = i // painter.batch
            pictures, _ = read_npz(distributed.part_of(folder, chunk))
        some[i] = pictures[i % painter.batch].copy()
    if npz:
        write_record(beside, identity, about)  # first: an .npz without it would be refused
        distributed.join_parts(painter, folder, npz)
        if not a.folder:
            gone = folder.with_name(folder.name + ".joined")  # in one go: another rank must not miss single parts
            folder.rename(gone)
            shutil.rmtree(gone)
    return some


def record(painter: SamplingPipeline, origin: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the pictures depend on, with the hashes of both files, and where it came from."""
    from megastar.tokenizer.io import tokenizer_hash
    from megastar.utils.files import sha256

    # The tokenizer's own hash leaves the decoder out, which draws the pictures.
    hashes = {f"{what}_sha256": sha256(Path(origin[what])) for what in ("weights", "tokenizer")}
    return painter.identity() | hashes, origin | {"tokenizer_hash": tokenizer_hash(origin["tokenizer"])}


def check_room(painter: SamplingPipeline, folder: Path, copies: int) -> None:
    """Raises ``UserError`` when the disk of ``folder`` has too little room for what is not there yet."""
    import math
    import shutil

    have = sum(p.stat().st_size for p in folder.glob("part-*.npz")) if folder.is_dir() else 0
    need = copies * math.prod(painter.shape) - have
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(there).free) < need:
        raise UserError(
            f"the pictures need {need / 1e6:.0f} MB and {there} has {free / 1e6:.0f} MB free: "
            "free space or name another place"
        )


def score_drawn(
    painter: SamplingPipeline,
    a: argparse.Namespace,
    origin: dict[str, Any],
    place: tuple[int, int],
    console: Console,
    words: list[str],
) -> None:
    """--score: this rank's share is drawn and scored; with --folder the pictures are kept there first, by all ranks."""
    import torch.distributed as dist

    from megastar.commands._score_options import options_of
    from megastar.evaluation.runner import sample_and_evaluate
    from megastar.sampling import distributed

    rank, world = place
    identity, about = record(painter, origin)
    console_of_one = console if rank == 0 else None
    group = join(rank, world)
    if a.folder:
        if rank == 0:
            check_room(painter, a.folder, 1)
        distributed.open_folder(a.folder, identity, about)
        distributed.sample_folder(painter, a.folder, rank=rank, world=world, console=console_of_one)
        if group is not None:
            dist.barrier(group)
    sample_and_evaluate(
        painter,
        a.real,
        rank=rank,
        world=world,
        group=group,
        folder=a.folder,
        **options_of(a),
        device=painter.sampler.decoder.device,
        batch=painter.batch,
        out=a.score if rank == 0 else None,
        console=console_of_one,
        provenance=about | identity | {"command": " ".join(["megastar sample", *words])},
    )
    if group is not None:
        dist.destroy_process_group()


def join(rank: int, world: int) -> dist.ProcessGroup | None:
    """The group over which statistics meet: gloo, whatever the pictures are drawn on. None for one process."""
    if world == 1:
        return None
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"{missing[0]} is not set: start with --nproc or torchrun, or set it in the batch script")
    # A rank may wait long for the others: while one reads the real set, or draws the last pictures.
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=1))
    return dist.group.WORLD
