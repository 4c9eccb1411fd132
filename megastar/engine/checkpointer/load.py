"""Resume: a checkpoint, or a weights file, back into the engines. How one is written: async_saver.py."""

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
from megastar.model.io import read_model_header
from megastar.parallel.plan import split_of
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.manifest import optimizer_of, require_weights
from megastar.utils.files import sha256
from megastar.utils.json_file import shown
from megastar.utils.safetensors_header import open_tensors


@torch.no_grad()
def load_checkpoint(ctx: Context, engines: Engines, checkpoint: Path, seed: int) -> dict[str, Any]:
    """Restore everything from ``checkpoint``, whatever ranks and ZeRO stage wrote it; returns its manifest.

    With another number of data ranks, dropout draws different numbers from here on, as ``seed`` determines; nothing else changes. Raises
    ``UserError`` for another network or optimizer and for files that are not what was written.
    """
    metadata = checkpoint_dir.parse_manifest(checkpoint)
    require_weights(checkpoint, metadata)
    names = list(metadata["files"])[ctx.rank :: ctx.world]  # the ranks share the hashing
    on_all_ranks(ctx, lambda: checkpoint_dir.verify(checkpoint, names))
    _same_network(metadata["parameters"], full_shapes(engines, ctx), checkpoint)
    _same_optimizer(optimizer_of(metadata), engines.optimizer.name, checkpoint)
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


@torch.no_grad()
def load_initial(init: str, ctx: Context, engines: Engines) -> dict[str, Any]:
    """Put the weights file ``init`` into the masters of student and average; returns the file's provenance.

    Every rank reads one whole tensor at a time. Raises ``UserError`` for a file of another network.
    """
    model, provenance, shapes = read_model_header(init)
    with open_tensors(init) as f:
        theirs = {"transformer." + n: list(shape) for n, shape in shapes.items()}
        ours = {n: s for n, s in full_shapes(engines, ctx).items() if n.startswith("transformer.")}
        _same_network(theirs, ours, Path(init))
        for shard in engines.shards():
            if shard.name in theirs:
                value = f.get_tensor(shard.name.removeprefix("transformer.")).float()
                split = split_of(shard.name) if ctx.tensor > 1 else None
                local = split.cut(value, ctx.tensor, ctx.mesh.tensor_rank) if split else value
                for kind in ("fp32", "ema"):
                    shard.view(kind).copy_(local.reshape(-1)[shard.start : shard.stop])
    engines.publish_masters()
    digest = {"sha256": sha256(Path(init))} if ctx.main else {}  # the main rank writes the manifest
    return {"file": init, "model": model.name, **provenance, **digest}


def _same_network(theirs: dict[str, list[int]], ours: dict[str, list[int]], checkpoint: Path) -> None:
    for name in [*ours, *theirs]:
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
