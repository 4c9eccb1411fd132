"""Outputs of ``megastar sample``: files that several processes share, or a score without files."""

from __future__ import annotations

import argparse
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.errors import UserError
from megastar.utils.redact import redact

if TYPE_CHECKING:
    import numpy as np
    import torch.distributed as dist
    from rich.console import Console

    from megastar.sampling.distributed import SamplingPipeline

JOIN_TIMEOUT = 3600.0  # seconds that ranks wait for each other before they generate
SHOWN_CLASSES = 16  # in the grid
GRID = Path("samples.png")  # its default file


def shown_images(labels: list[int], columns: int) -> list[int]:
    """Indices of the images in the grid: the first ``columns`` of each of the first classes."""
    shown = set(sorted(set(labels))[:SHOWN_CLASSES])
    counts, out = dict.fromkeys(shown, 0), []
    for i, c in enumerate(labels):
        if c in shown and counts[c] < columns:
            counts[c] += 1
            out.append(i)
    return out


def parts_of(npz: Path) -> Path:
    """The folder of the finished parts of ``npz`` where --folder names none."""
    return npz.with_name(npz.name + ".parts")


def sample_to_files(
    pipeline: SamplingPipeline,
    a: argparse.Namespace,
    origin: dict[str, Any],
    place: tuple[int, int],
    columns: int,
    console: Console,
) -> dict[int, np.ndarray]:
    """Generate this rank's share of --npz and --folder; rank 0 joins the parts and returns the images of the grid.

    A record beside the .npz identifies the command that wrote it: repeating it samples nothing and returns images only for a
    grid that is missing or named, another command fails.
    """
    from megastar.sampling import distributed
    from megastar.sampling.npz import read_npz, read_some, record_of, write_record

    rank, world = place
    npz: Path | None = a.npz
    identity, provenance = record(pipeline, origin)
    folder: Path = a.folder or parts_of(a.npz)
    if npz and npz.exists():
        if not record_of(npz).is_file():
            raise UserError(f"{npz} exists, but its record {record_of(npz)} does not: name another file, or remove it")
        distributed.check_plan(record_of(npz), identity)
        console.print(f"{npz} is already complete", markup=False, highlight=False)
        if rank or (a.out is None and GRID.exists()):
            return {}
        grid = read_some(npz, pipeline.shape, shown_images(pipeline.labels, columns))
        if not a.folder:
            remove_parts(folder)  # of a command that was killed after it had joined them
        return grid
    if rank == 0:
        check_free_space(pipeline, folder, 1 + bool(npz))
    distributed.open_folder(folder, identity, provenance)
    if rank and npz and npz.exists():  # rank 0 joined the parts before this process started
        return {}
    try:
        distributed.sample_folder(pipeline, folder, rank=rank, world=world, console=console if rank == 0 else None)
    except FileNotFoundError:
        if rank and not folder.exists():  # rank 0 joined and removed the parts
            return {}
        raise
    if rank:
        return {}
    shown: dict[int, np.ndarray] = {}
    for chunk, indices in groupby(shown_images(pipeline.labels, columns), lambda i: i // pipeline.batch):
        images, _ = read_npz(distributed.part_of(folder, chunk), pipeline.part_shape(chunk))
        shown |= {i: images[i % pipeline.batch].copy() for i in indices}
    if npz:
        write_record(record_of(npz), identity, provenance)  # before the .npz, which is refused without a record
        distributed.join_parts(pipeline, folder, npz)
        if not a.folder:
            remove_parts(folder)
    return shown


def remove_parts(folder: Path) -> None:
    """Remove the folder of parts that were joined, and what is left of an earlier removal."""
    import shutil

    gone = folder.with_name(folder.name + ".joined")
    if gone.is_dir():
        shutil.rmtree(gone)
    if folder.is_dir():
        folder.rename(gone)  # at once, so that no rank finds only some of the parts
        shutil.rmtree(gone)


def record(pipeline: SamplingPipeline, origin: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the images depend on, with the hashes of both files, and their provenance."""
    from megastar.tokenizer.io import tokenizer_hash
    from megastar.utils.files import sha256

    # tokenizer_hash excludes the decoder, which the images depend on.
    hashes = {f"{what}_sha256": sha256(Path(origin[what])) for what in ("weights", "tokenizer")}
    return pipeline.identity() | hashes, origin | {"tokenizer_hash": tokenizer_hash(origin["tokenizer"])}


def check_free_space(pipeline: SamplingPipeline, folder: Path, copies: int) -> None:
    """Raise ``UserError`` if the disk of ``folder`` has too little free space for the missing images."""
    import math

    from megastar.utils.files import check_space

    have = sum(p.stat().st_size for p in folder.glob("part-*.npz")) if folder.is_dir() else 0
    need = copies * math.prod(pipeline.shape) - have
    check_space(folder, need, "the images need", "free space or name another place")


def sample_and_score(
    pipeline: SamplingPipeline,
    a: argparse.Namespace,
    origin: dict[str, Any],
    place: tuple[int, int],
    console: Console,
    words: list[str],
) -> None:
    """--score: generate and score this rank's share; with --folder, all ranks first write the images there."""
    import torch.distributed as dist

    from megastar.commands._shared.common import score_options_of
    from megastar.evaluation.image_sources import check_applicable
    from megastar.evaluation.runner import sample_and_evaluate
    from megastar.sampling import distributed

    rank, world = place
    identity, provenance = record(pipeline, origin)
    main_console = console if rank == 0 else None
    check_applicable(a.real, a.real_subset, a.real_tokenizer)  # --folder is filled before the reference is opened
    group = join(rank, world)
    if a.folder:
        if rank == 0:
            check_free_space(pipeline, a.folder, 1)
        distributed.open_folder(a.folder, identity, provenance)
        distributed.sample_folder(pipeline, a.folder, rank=rank, world=world, console=main_console)
        if group is not None:
            dist.barrier(group)
    sample_and_evaluate(
        pipeline,
        a.real,
        rank=rank,
        world=world,
        group=group,
        folder=a.folder,
        **score_options_of(a),
        device=pipeline.sampler.decoder.device,
        batch=pipeline.batch,
        out=a.score if rank == 0 else None,
        console=main_console,
        provenance=provenance | identity | {"command": redact(" ".join(["megastar sample", *words]))},
    )
    if group is not None:
        dist.destroy_process_group()


def join(rank: int, world: int) -> dist.ProcessGroup | None:
    """The gloo group that reduces statistics, on any device. None for one process."""
    if world == 1:
        return None
    import torch.distributed as dist

    from megastar.parallel import rendezvous

    store = rendezvous.join(JOIN_TIMEOUT, setting="the limit of this command")
    # A rank may wait long while another reads the real set or generates the last images.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(days=1))
    return dist.group.WORLD
