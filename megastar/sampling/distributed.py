"""Sampling by many processes: images are sampled in chunks, and finished chunks are files, so none is sampled twice.

Chunk c holds images c * batch ... (c + 1) * batch - 1 of a plan. Its bytes do not depend on which rank samples it, on
the number of ranks, on crashes or on restarts. Ranks share only a folder: no process group is created.

  FOLDER/plan.json        what is sampled: hashes of labels, weights and tokenizer, seed, guidance ...
  FOLDER/part-00000.npz   a finished chunk (arr_0 images, arr_1 classes), written atomically
  FOLDER/00000.claim      a chunk that a running process is sampling
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.npz import read_npz, save_npz, write_record
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import (
    ProgressCallback,
    Sampler,
    check_tokenizer,
    decode_images,
    progress_callback,
    sample_seeds,
)
from megastar.tokenizer.vq import VQModel
from megastar.utils.device import DTYPES
from megastar.utils.files import remove_dead_temporaries
from megastar.utils.json_file import ANY, dict_of, read_json, record, shown, text, validator
from megastar.utils.lockfile import Claims
from megastar.utils.progress_bar import progress_bar

PLAN = "plan.json"
_PLAN = validator(record({"identity": dict_of(text(1000), ANY)}))
FORMAT = 1
LABEL_PLANS = ("balanced", "random")
POLL = 0.5  # seconds between checks for the chunks of other ranks
_STREAM = int.from_bytes(b"labels", "big")  # makes the labels' random numbers independent of other uses of the seed


def plan_labels(plan: str, count: int, classes: list[int], seed: int) -> list[int]:
    """The class of each of ``count`` images, from ``classes``.

    ``balanced``: in turn, so each class has count / classes images, the first classes one more for the remainder.
    ``random``: independent draws, as in LlamaGen's sample_c2i_ddp.py; a larger count keeps the first labels.
    """
    assert plan in LABEL_PLANS and classes, plan
    if plan == "balanced":
        return [classes[i % len(classes)] for i in range(count)]
    numbers = np.random.Philox(key=[seed, _STREAM]).random_raw(count) >> np.uint64(11)
    return [classes[int(u * 2.0**-53 * len(classes))] for u in numbers]


def labels_like(pool: list[int], count: int, seed: int) -> list[int]:
    """The classes of ``count`` images, as frequent as in ``pool``; a larger count keeps the first labels."""
    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    return [pool[i] for i in order[np.arange(count) % len(pool)]]


class SamplingPipeline:
    """Samples any chunk of a plan: ``labels`` (N,), image i from ``seed`` and i.

    ``size``: images are resized to it before conversion to uint8 (LlamaGen scores its 384-pixel models at 256).
    ``rank`` appears only in errors. Raises ``UserError`` for a tokenizer with other codes and for invalid options.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: VQModel,
        labels: list[int],
        *,
        seed: int = 0,
        options: SamplingOptions | None = None,
        batch: int = 64,
        passes: int = 1,
        rank: int = 0,
        size: int | None = None,
    ):
        check_tokenizer(model.cfg, tokenizer)
        outside = [c for c in labels if not 0 <= c < model.cfg.num_classes]
        if outside:
            raise UserError(f"class {outside[0]} is outside 0..{model.cfg.num_classes - 1}, the classes of the model")
        self.size = size or tokenizer.config.image_size
        self.tokenizer, self.labels, self.seeds = tokenizer, labels, sample_seeds(seed, len(labels))
        self.batch, self.seed, self.options = batch, seed, options or SamplingOptions()
        self.sampler = Sampler(model, self.options, batch, passes=passes, rank=rank)

    @property
    def chunks(self) -> int:
        return -(-len(self.labels) // self.batch)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, 3)"""
        return len(self.labels), self.size, self.size, 3

    def indices(self, chunk: int) -> np.ndarray:
        """Indices of the chunk's images, (n,) int64."""
        return np.arange(chunk * self.batch, min((chunk + 1) * self.batch, len(self.labels)))

    def part_shape(self, chunk: int) -> tuple[int, int, int, int]:
        """(n, H, W, 3) of the chunk's images."""
        return len(self.indices(chunk)), *self.shape[1:]

    def sample_chunk(self, chunk: int, on_progress: ProgressCallback | None = None) -> np.ndarray:
        """The chunk's images (n, H, W, 3) uint8."""
        rows = slice(chunk * self.batch, (chunk + 1) * self.batch)
        codes = self.sampler.draw(torch.tensor(self.labels[rows]), self.seeds[rows], on_progress)
        return decode_images(self.tokenizer, codes, self.batch, self.size)

    def identity(self) -> dict[str, Any]:
        """What the images depend on, except the weights and the tokenizer, whose files the caller hashes."""
        native, dtype = self.tokenizer.config.image_size, self.sampler.decoder.dtype
        return {
            "format": FORMAT,
            "count": len(self.labels),
            "labels_sha256": hashlib.sha256(np.asarray(self.labels, "<i8").tobytes()).hexdigest(),
            "seed": self.seed,
            "image_size": self.size,
            "resize": None if native == self.size else f"bicubic from {native}",
            "dtype": next(name for name, kind in DTYPES.items() if kind == dtype),
            **self.options.recorded(),
            "batch": self.batch,
        }


def iterate_images(
    pipeline: SamplingPipeline,
    *,
    rank: int = 0,
    world: int = 1,
    folder: Path | None = None,
    console: Console | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of the images as they are sampled: (indices (n,) int64, images (n, H, W, 3) uint8).

    Rank r samples chunks r, r + world ..., so all ranks together sample each image once. Nothing is written; with
    ``folder``, chunks that ``sample_folder`` finished there are read instead of sampled.
    """
    chunks = range(rank, pipeline.chunks, world)
    with progress_bar(console, "sampling", sum(len(pipeline.indices(c)) for c in chunks)) as bar:
        for chunk in chunks:
            indices, done = pipeline.indices(chunk), bar.done
            if folder is not None and (part := part_of(folder, chunk)).is_file():
                images, _ = read_npz(part, pipeline.part_shape(chunk))
            else:
                images = pipeline.sample_chunk(chunk, progress_callback(bar, len(indices)))
            bar.update(done + len(indices))
            yield indices, images


def part_of(folder: Path, chunk: int) -> Path:
    return folder / f"part-{chunk:05d}.npz"


def open_folder(folder: Path, identity: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write the plan into ``folder``, or check the one there: ``UserError`` lists the fields that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(PLAN))
        if others and not path.is_file():
            raise UserError(f"{folder} has no {PLAN} but other files ({', '.join(others[:3])}): name an empty folder")
        temporary = folder / f"{PLAN}.{socket.gethostname()}.{os.getpid()}"  # nodes may share process ids
        write_record(temporary, identity, metadata or {})
        try:
            with suppress(FileExistsError):  # the first rank's file stays; the others compare theirs with it below
                os.link(temporary, path)
        finally:
            temporary.unlink()
    check_plan(path, identity)


def check_plan(path: Path, identity: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if the plan in the file differs from ``identity``."""
    found = read_json(path, _PLAN, "choose another output path")["identity"]

    def short(value: Any) -> str:
        return shown(value, 12 if isinstance(value, str) else 80)

    keys = [k for k in sorted({*found, *identity}) if found.get(k) != identity.get(k)]
    if keys:
        differ = "; ".join(f"{k} {short(found.get(k))}, not {short(identity.get(k))}" for k in keys)
        raise UserError(
            f"{path} records other images: {differ}; choose another output path, or request the same images"
        )


def sample_folder(
    pipeline: SamplingPipeline, folder: Path, *, rank: int = 0, world: int = 1, console: Console | None = None
) -> None:
    """Sample the chunks missing in ``folder`` (see ``open_folder``) together with the other ranks.

    Each rank starts at another chunk, so ranks rarely compete for one. Rank 0 returns when all parts exist, and samples
    those of ranks that died; the others return when no chunk is left to claim.
    """
    order = np.roll(np.arange(pipeline.chunks), -(pipeline.chunks * rank // world)).tolist()
    missing = set(order)

    def done() -> int:
        present = {p.name for p in folder.iterdir()}  # one listing, not one query per part: the folder may be remote
        missing.difference_update([c for c in missing if part_of(folder, c).name in present])
        return len(pipeline.labels) - sum(len(pipeline.indices(c)) for c in missing)

    with Claims(folder) as claims, progress_bar(console, "sampling", len(pipeline.labels), done=done()) as bar:
        while missing:
            sampled = False
            for chunk in [c for c in order if c in missing]:
                part = part_of(folder, chunk)
                if chunk not in missing or part.is_file() or not claims.take(f"{chunk:05d}"):
                    continue
                if not part.is_file():  # its owner may have finished just before the claim
                    bar.update(done())
                    indices = pipeline.indices(chunk)
                    images = pipeline.sample_chunk(chunk, progress_callback(bar, len(indices)))
                    save_npz(part, images.shape, [images], np.asarray(pipeline.labels)[indices])
                claims.release(f"{chunk:05d}")
                sampled = True
                bar.update(done())
            if not sampled and rank:
                return
            if not sampled:
                time.sleep(POLL)
            bar.update(done())
    if rank == 0:
        remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the files of killed ranks: claims of finished parts, and temporary files."""
    for claim in folder.glob("*.claim"):
        if part_of(folder, int(claim.stem)).is_file():
            claim.unlink(missing_ok=True)
    remove_dead_temporaries(folder)


def join_parts(pipeline: SamplingPipeline, folder: Path, out: Path) -> None:
    """Write all parts into one .npz, with one part at a time in memory."""
    parts = (read_npz(part_of(folder, c), pipeline.part_shape(c))[0] for c in range(pipeline.chunks))
    save_npz(out, pipeline.shape, parts, np.asarray(pipeline.labels))
