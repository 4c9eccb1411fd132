"""The data of a run: its shards are the right ones, in the right order, and the loader stands at the right place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megastar.config.schema import RunConfig
from megastar.data.loader import TokenLoader, check_enough, check_manifest, validation_batches
from megastar.data.order import VERSION as ORDER
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.engine.context import Context
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.tokenizer.io import tokenizer_hash


def open_data(cfg: RunConfig) -> tuple[Manifest, Manifest | None]:
    """Check everything about the shards that can be known before anything is built; training's and validation's."""
    expected = tokenizer_hash(cfg.data.tokenizer) if cfg.data.tokenizer and Path(cfg.data.tokenizer).is_file() else None
    if cfg.data.tokenizer and expected is None:
        raise UserError(f"data.tokenizer={cfg.data.tokenizer} does not exist: name the tokenizer that made the shards")
    manifest = load_manifest(cfg.data.shards, cfg.data)
    check_manifest(manifest, cfg.model, expected, cfg.views)
    check_enough(cfg.data.shards, manifest, cfg.train.global_batch)
    if not cfg.data.val_shards:
        return manifest, None
    validation = load_manifest(cfg.data.val_shards, cfg.data)
    check_manifest(validation, cfg.model, expected, 1)
    if validation.classes != manifest.classes:
        raise UserError(
            f"{cfg.data.val_shards} and {cfg.data.shards} name other classes: make both from folders of the same names"
        )
    hashes = [m.tokenizer_sha256 for m in (manifest, validation)]
    if all(hashes) and hashes[0] != hashes[1]:
        raise UserError(
            f"{cfg.data.shards} was made with the tokenizer {hashes[0][:12]}..., {cfg.data.val_shards} with {hashes[1][:12]}...: pretokenize both with one"
        )
    return manifest, validation


def check_same_data(cfg: RunConfig, restored: dict[str, Any], digests: dict[str, str], found: Path) -> None:
    """Raise ``UserError`` for other shards than the checkpoint's, wherever they lie now."""
    for name, what, where in (
        ("data", "was trained on", f"data.shards = {cfg.data.shards}"),
        ("val_data", "was validated on", f"data.val_shards = {cfg.data.val_shards}"),
    ):
        if restored.get(name, digests[name]) != digests[name]:
            raise UserError(f"{where} holds other shards than {found} {what}: restore them, or choose another run=...")


def check_same_order(cfg: RunConfig, manifest: Manifest, restored: dict[str, Any], found: Path) -> None:
    """Raise ``UserError`` where the checkpoint's samples came in another order: some would come twice, some never.

    With no more shards than are mixed, all versions of the order are one.
    """
    shards, order = sum(n > 0 for n in manifest.shard_sizes), restored.get("order", 1)
    if order != ORDER and shards > cfg.data.window:
        raise UserError(
            f"{found} was trained in order {order} of the samples, this version of megastar knows order {ORDER}: finish that run with the version that began it, or begin another run=... from it with train.init={found}"
        )


def digest_of(manifest: Manifest | None) -> str:
    """SHA-256 over the shards' own: a run resumes on the samples it was trained on, or not at all."""
    if manifest is None:
        return ""
    return hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode()).hexdigest()


def make_loader(cfg: RunConfig, ctx: Context, engines: Engines, position: int) -> TokenLoader:
    """``position``: the batches that lie before the first one."""
    return TokenLoader(
        cfg.data.shards,
        seed=cfg.train.seed,
        global_batch=cfg.train.global_batch,
        rank=ctx.mesh.data_rank,
        world=ctx.mesh.data,
        accumulation=engines.accumulation,
        views=cfg.views,
        class_dropout_prob=cfg.model.class_dropout_prob,
        num_classes=cfg.model.num_classes,
        vocab_size=cfg.model.vocab_size,
        tokens=cfg.model.image_tokens,
        window=cfg.data.window,
        start_step=position,
        data=cfg.data,
        device=ctx.device,
    )


def make_validation(cfg: RunConfig, ctx: Context, engines: Engines) -> list[dict[str, Any]]:
    if not cfg.data.val_shards or not cfg.train.val_every:
        return []
    batches: Iterator[dict[str, Any]] = validation_batches(
        cfg.data.val_shards,
        cfg.train.val_images,
        engines.micro_batch,
        ctx.mesh.data_rank,
        ctx.mesh.data,
        data=cfg.data,
    )
    return list(batches)
