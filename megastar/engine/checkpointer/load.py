"""Resume: a checkpoint back into the engines. How one is written: async_saver.py; weights files: initial_weights.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megastar.checkpoint.rng_state import random_file, seed_dropout
from megastar.checkpoint.shard_format import StateReader
from megastar.engine.context import Context
from megastar.engine.rank_sync import on_all_ranks
from megastar.engine.zero.engines import Engines, full_shapes
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.manifest import optimizer_of, require_weights
from megastar.utils.json_file import shown

TARGETS = "transformer.target_embeddings.weight"  # of a network of random token order


@torch.no_grad()
def load_checkpoint(ctx: Context, engines: Engines, checkpoint: Path, seed: int) -> dict[str, Any]:
    """Restore everything from ``checkpoint``, whatever ranks and ZeRO stage wrote it; returns its manifest.

    With another number of data ranks, dropout draws different numbers from here on, as ``seed`` determines; nothing else changes. Raises
    ``UserError`` for another network or optimizer and for files that are not what was written.
    """
    metadata = check_resumable(ctx, engines, checkpoint)
    names = list(metadata["files"])[ctx.rank :: ctx.world]  # the ranks share the hashing
    on_all_ranks(ctx, lambda: checkpoint_dir.verify(checkpoint, names))
    reader = StateReader(checkpoint, metadata, (ctx.rank, ctx.world))
    for shard in engines.shards():
        where = (ctx.tensor, ctx.mesh.tensor_rank, shard.start, shard.stop)
        for kind in shard.kinds:
            shard.view(kind).copy_(reader.range(shard.name, kind, *where))
        engines.optimizer.state[shard.flat]["step"].fill_(reader.optimizer_step)
    engines.publish_masters()
    engines.set_step(metadata["step"])
    random = checkpoint / random_file(ctx.mesh.data_rank)
    if metadata["mesh"]["data"] == ctx.mesh.data:
        try:
            state = torch.load(random, weights_only=True)
            torch.set_rng_state(state["torch"])
            if "cuda" in state and ctx.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], ctx.device)
        except Exception as error:  # torch.load raises many types for damaged files
            raise checkpoint_dir.damaged(checkpoint, f"{random} is damaged ({shown(str(error))})") from error
    else:
        seed_dropout(seed, ctx.mesh.data_rank, metadata["step"])
    return metadata


def check_resumable(ctx: Context, engines: Engines, checkpoint: Path) -> dict[str, Any]:
    """The manifest of ``checkpoint``. Raises ``UserError`` for one of another network or optimizer."""
    metadata = checkpoint_dir.parse_manifest(checkpoint)
    require_weights(checkpoint, metadata)
    _same_network(metadata["parameters"], full_shapes(engines, ctx), checkpoint)
    _same_optimizer(optimizer_of(metadata), engines.optimizer.name, checkpoint)
    return metadata


def _same_network(theirs: dict[str, list[int]], ours: dict[str, list[int]], checkpoint: Path) -> None:
    for name in [*ours, *theirs]:
        if name == TARGETS and (name in theirs) != (name in ours):
            orders = ("random", "raster") if name in theirs else ("raster", "random")
            raise UserError(
                f"{checkpoint} was trained in {orders[0]} token order, this configuration has token_order.kind = {orders[1]}, "
                f"which cannot change on resume: set token_order.kind={orders[0]}, or start another run=... from its weights "
                "(train.init, train.init_any_order=true)"
            )
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{checkpoint} is of another network: {name} is {theirs.get(name, 'absent')} there, "
                f"{ours.get(name, 'absent')} in this configuration: use the checkpoint's model section"
            )


def _same_optimizer(theirs: str, ours: str, checkpoint: Path) -> None:
    if theirs != ours:
        raise UserError(
            f"{checkpoint} was trained with optim.name = {theirs}, this configuration sets {ours}, and their states differ: "
            f"set optim.name={theirs}, or start another run=... from its weights (megastar convert, train.init)"
        )
