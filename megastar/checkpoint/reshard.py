"""Reshard a checkpoint: write the files that data x tensor ranks at ZeRO-3 would have written.

A run reads any checkpoint without resharding. After resharding, each rank finds its part of the split weights in its own
file, and its part of the others in the files of its tensor group, which saves a large run many small reads. Other ZeRO
stages partition differently; they read it too, from more files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megastar.checkpoint.atomic_output import READS_BACK, settle, staged
from megastar.checkpoint.rng_state import random_file, seed_dropout
from megastar.checkpoint.shard_format import OPEN_FILES, Piece, StateReader, kinds_of, piece_writer, state_file
from megastar.checkpoint.source import Source, same_bits, stored_elements
from megastar.config.rules.problem import divisors, words
from megastar.errors import UserError
from megastar.parallel.head import check_tensor
from megastar.parallel.mesh import Mesh
from megastar.parallel.plan import split_of
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.checkpoint_dir import name_of, publish, read_manifest, verify
from megastar.run_dir.layout import CHECKPOINTS
from megastar.utils.files import sha256
from megastar.utils.progress_bar import ProgressBar, progress_bar

HOLDS = (CHECKPOINTS,)


def pieces_of(shapes: dict[str, tuple[int, ...]], mesh: Mesh, optimizer: str = "adamw") -> list[Piece]:
    """The pieces that a rank writes at ZeRO-3: one of ``data`` equal parts of each parameter of its tensor rank.

    The last part may be shorter. Weights replicated in a tensor group are divided between its ranks.
    """
    out = []
    for name, shape in shapes.items():
        split = split_of(name) if mesh.tensor > 1 else None
        size = torch.Size(split.local_shape(shape, mesh.tensor) if split else shape).numel()
        part = -(-size // mesh.data)
        low, high = (min(part * d, size) for d in (mesh.data_rank, mesh.data_rank + 1))
        if mesh.tensor > 1 and not split:
            low, high = (low + (high - low) * t // mesh.tensor for t in (mesh.tensor_rank, mesh.tensor_rank + 1))
        if low < high:
            out.append(Piece(name, mesh.tensor_rank if split else 0, low, high, kinds_of(name, optimizer)))
    return out


def to_checkpoint(source: Source, out: Path, data: int, tensor: int, force: bool) -> str:
    """Write the run folder ``out`` with one checkpoint; returns what was written and how it was checked."""
    check_tensor(source.cfg.model, tensor)
    batch = source.cfg.train.global_batch
    if batch % data:
        raise UserError(
            f"--data {data} does not divide train.global_batch {batch}, which a resumed run keeps: "
            f"use {words(divisors(batch))}"
        )
    if source.folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--out {out} contains the source {source.folder}: name another folder")
    reader, name = source.reader, name_of(source.manifest["step"])
    size = 4 * stored_elements(reader)
    headers = data * tensor * (600 * len(reader.shapes) + (1 << 14))
    with staged(out, size + headers, force, HOLDS) as root:
        source.verify()
        folder = root / CHECKPOINTS
        written = folder / checkpoint_dir.WRITING / name
        written.mkdir(parents=True)
        with progress_bar(source.console, "writing", size, bytes=True, transient=True) as bar:
            files = write_states(source, written, data, tensor, bar)
        files |= write_random(source, written, data, tensor)
        for file in files:
            settle(written / file)
        manifest = source.manifest | {
            "mesh": {"data": data, "tensor": tensor, "zero_stage": 3},
            "converted": {"from": str(source.folder), "mesh": source.manifest["mesh"]},
            "files": dict(sorted(files.items())),
        }
        manifest["config"] = json.loads(json.dumps(source.manifest["config"]))
        manifest["config"]["parallel"]["tensor_parallel"] = tensor
        again = publish(folder, name, manifest)
        with progress_bar(source.console, "reading back", size, bytes=True, transient=True) as bar:
            compare(source, again, bar)
    return f"{data * tensor} files, read back and equal to the source"


def write_states(source: Source, folder: Path, data: int, tensor: int, bar: ProgressBar) -> dict[str, Any]:
    """Write every rank's state file; each parameter is read once per ``OPEN_FILES`` ranks."""
    files: dict[str, Any] = {}
    world = data * tensor
    for first in range(0, world, OPEN_FILES):
        meshes = [Mesh(world, tensor, rank) for rank in range(first, min(world, first + OPEN_FILES))]
        pieces = [{p.name: p for p in pieces_of(source.reader.shapes, m, source.reader.optimizer)} for m in meshes]
        writers = []
        try:
            for mesh, mine in zip(meshes, pieces, strict=True):
                writers.append(piece_writer(folder / state_file(mesh.rank), list(mine.values())))
            for name in source.reader.shapes:
                for kind in source.reader.kinds(name):
                    bar.advance(write_parameter(source, name, kind, tensor, list(zip(writers, pieces, strict=True))))
        except BaseException as error:
            for writer in writers:
                writer.__exit__(type(error), error)
            raise
        for mesh, writer in zip(meshes, writers, strict=True):
            writer.__exit__(None)
            whose = f"rank {mesh.rank}: data rank {mesh.data_rank}, tensor rank {mesh.tensor_rank}"
            files[state_file(mesh.rank)] = {"bytes": writer.bytes, "sha256": writer.sha256, "whose": whose}
    return files


def write_parameter(
    source: Source, name: str, kind: str, tensor: int, ranks: list[tuple[Any, dict[str, Piece]]]
) -> int:
    """Write one tensor's pieces to the ranks' files; returns the bytes written."""
    split = split_of(name) if tensor > 1 else None
    whole, done = source.reader.whole(name, kind), 0
    for t in range(tensor if split else 1):
        flat = (split.cut(whole, tensor, t) if split else whole).reshape(-1)
        for writer, mine in ranks:
            if (piece := mine.get(name)) and piece.tensor_rank == t:
                writer.write(f"{kind}/{name}", flat[piece.start : piece.stop])
                done += 4 * (piece.stop - piece.start)
    return done


def write_random(source: Source, folder: Path, data: int, tensor: int) -> dict[str, Any]:
    """Write the data ranks' random states: copied if their number is unchanged, else seeded as a resumed run does."""
    files = {}
    for d in range(data):
        path = folder / random_file(d)
        if data == source.manifest["mesh"]["data"]:
            shutil.copyfile(source.folder / path.name, path)
        else:
            with torch.random.fork_rng(devices=[]):
                seed_dropout(source.cfg.train.seed, d, source.manifest["step"])
                seed, state = torch.initial_seed(), torch.get_rng_state()
            # A CUDA generator's state is its seed and offset, unsigned, so it can be written without a GPU.
            cuda = torch.from_numpy(np.array([seed, 0], np.uint64).view(np.uint8))
            torch.save({"torch": state, "cuda": cuda}, path)
        whose = f"rank {d * tensor}: data rank {d}, tensor rank 0"
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "whose": whose}
    return files


def compare(source: Source, folder: Path, bar: ProgressBar) -> None:
    """Compare every tensor of the checkpoint in ``folder`` with the source. Raises ``UserError``."""
    manifest = read_manifest(folder)
    verify(folder, [n for n in manifest["files"] if not n.startswith("state-")])
    reader = StateReader(folder, manifest)
    for name, shape in reader.shapes.items():
        for kind in reader.kinds(name):
            if not same_bits(reader.whole(name, kind), source.reader.whole(name, kind)):
                raise UserError(f"{kind} of {name} {READS_BACK}")
            bar.advance(4 * torch.Size(shape).numel())
