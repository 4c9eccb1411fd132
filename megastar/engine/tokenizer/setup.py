"""What all ranks of a tokenizer's training agree on before its first step: their number, configuration and images."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megastar.config.env_text import recorded
from megastar.config.load import flatten
from megastar.config.schema import TokenizerTrainConfig
from megastar.data.images.dataset import ImageSet
from megastar.engine.context import Context
from megastar.engine.phase import START_EXTRA
from megastar.engine.rank_setup import init_group, read_place, set_device
from megastar.engine.rank_sync import from_main, gather, on_all_ranks, run_on_main
from megastar.errors import UserError
from megastar.utils.device import pick_device, pick_dtype
from megastar.utils.files import open_regular
from megastar.utils.hostname import host_name
from megastar.utils.launcher import place_of

T = TypeVar("T")
OF_A_RANK = ("threads",)  # fields that may differ between ranks
PIECE = 1 << 28  # bytes of a checkpoint that are sent at once


def check_ranks(batch: int, world: int, rank: int = 0) -> None:
    """Raises ``UserError`` if the global batch cannot be divided among ``world`` ranks, of which the first reports it."""
    if batch % world:
        near = [n for n in range(1, batch + 1) if batch % n == 0 and n <= 2 * world]
        raise UserError(
            f"batch = {batch} images of a step do not divide among {world} ranks: start {' or '.join(map(str, near[-2:]))} "
            f"ranks, or set batch to a multiple of {world} (another batch is another run)",
            reported=rank > 0,
        )


def join(cfg: TokenizerTrainConfig, stopped: Callable[[], int] = lambda: 0) -> Context:
    """Join the process group of the launch, if it has several ranks. Raises ``UserError`` for a batch that does not divide
    among them or for configurations that differ, and as ``parallel.rendezvous.join``."""
    place = place_of(os.environ)
    check_ranks(cfg.batch, place.world, place.rank)
    if place.world == 1:
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        device = pick_device()
        return Context(0, 1, device, pick_dtype(cfg.dtype, device))
    rank, world, local = read_place()
    device = set_device(local, cfg.threads, cfg.faults)
    limit = cfg.faults.hang_timeout
    timeout = timedelta(seconds=limit + START_EXTRA + 60) if limit else timedelta(days=1)
    init_group(rank, world, device, timeout, cfg.faults.join_timeout, stopped)
    ctx = Context(rank, world, device, pick_dtype(cfg.dtype, device), data_group=dist.group.WORLD)
    ctx.secret = bytes.fromhex(from_main(ctx, secrets.token_hex(32)))
    _one_configuration(cfg, ctx)
    return ctx


def _one_configuration(cfg: TokenizerTrainConfig, ctx: Context) -> None:
    """All ranks have the same fields and precision; a launch by hand may mix two commands."""
    mine = flatten(recorded(asdict(cfg))) | {"precision": str(ctx.dtype)}
    main = from_main(ctx, mine)
    differing = [
        f"{k} = {mine.get(k)}, not {main.get(k)}" for k in main if k not in OF_A_RANK and mine.get(k) != main[k]
    ]
    found = gather(ctx, ", ".join(differing))
    for rank, text in enumerate(found):
        if text:
            raise UserError(
                f"rank {rank} has another configuration than rank 0 ({text}): give all ranks the same command",
                reported=rank != ctx.rank,
            )


def one_set_of_pictures(ctx: Context, pictures: ImageSet, source: str) -> dict[str, Any]:
    """``count`` and ``digest`` of the training images. Raises ``UserError`` if they differ between ranks: a node may have
    another copy. A collective."""
    every = gather(ctx, (host_name(), len(pictures), pictures.digest()))
    _, count, digest = every[0]
    for rank, (host, here, its_digest) in enumerate(every):
        if its_digest != digest:
            raise UserError(
                f"rank {rank} on {host} finds {here} images in {source}, which differ from the {count} of rank 0: give all "
                "nodes the same images",
                reported=rank != ctx.rank,
            )
    return {"count": count, "digest": digest}


def reported_once(ctx: Context, make: Callable[[], T]) -> T:
    """``on_all_ranks``, for errors that all ranks find alike: rank 0 reports them."""
    try:
        return on_all_ranks(ctx, make)
    except UserError as error:
        raise UserError(*error.args, reported=not ctx.main) from error


class FoundFile(NamedTuple):
    """A file that rank 0 found; ``content`` only on several ranks, whose views of a disk may differ."""

    content: bytes | None


def read_by_main(ctx: Context, path: Path) -> FoundFile | None:
    """The file at ``path`` as rank 0 finds it; None without one. A collective."""
    size = run_on_main(ctx, lambda: path.stat().st_size if path.is_file() else -1)
    if size < 0:
        return None
    return FoundFile(_bytes_of_main(ctx, path, size) if ctx.world > 1 else None)


def _bytes_of_main(ctx: Context, path: Path, size: int) -> bytes:
    """The ``size`` bytes of a file of rank 0, on all ranks."""
    data = bytearray(size)

    def read() -> None:
        if not ctx.main:
            return
        with open_regular(path) as f:
            if f.readinto(data) != size:
                raise UserError(f"{path} changed while it was read: let the process that writes it end")

    on_all_ranks(ctx, read)
    whole = torch.frombuffer(data, dtype=torch.uint8) if size else torch.zeros(0, dtype=torch.uint8)
    for piece in whole.split(PIECE):
        sent = piece.to(ctx.device)
        dist.broadcast(sent, src=0)
        piece.copy_(sent)
    return bytes(data)
