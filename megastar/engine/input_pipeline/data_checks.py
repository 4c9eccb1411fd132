"""The data of a run: its shards fit the configuration, and are those of the checkpoint, in its order."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastar.checkpoint.convert_weights import open_weights
from megastar.checkpoint.hub.download import local_source
from megastar.checkpoint.hub.layout import is_hub_folder
from megastar.checkpoint.source import open_source
from megastar.config.model_sizes import take_sizes
from megastar.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from megastar.data.loader import check_enough, check_manifest, open_shards, validation_batches
from megastar.data.online_features import OnlineFeatures
from megastar.data.order import VERSION as ORDER
from megastar.data.prefetch import Batch
from megastar.data.shards.features import check_same_features
from megastar.data.shards.import_webdataset import WRITER
from megastar.data.shards.manifest import Manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.shard_table import digest_of
from megastar.data.token_order import validates_permuted
from megastar.engine.context import Context
from megastar.engine.input_pipeline.feature_checks import check_features, check_same_encoder, open_online
from megastar.errors import UserError
from megastar.run_dir.config_file import sizes_of_run
from megastar.tokenizer.io import no_tokenizer_file, read_tokenizer_metadata, tokenizer_hash


@dataclass(frozen=True)
class RunData:
    """The token shards of a run, each store opened and each manifest parsed once."""

    train: ShardSet
    val: ShardSet | None
    tokenizer: str = ""  # SHA-256 of the tokenizer that the shards were made with, or of data.tokenizer
    tokenizer_file: str = ""  # absolute path of data.tokenizer, so that it is found from any working directory
    told: tuple[str, ...] = ()  # sizes of the model that were taken from the data
    online: OnlineFeatures | None = None  # features that are computed in training

    @property
    def digests(self) -> dict[str, str]:
        """What a checkpoint records of them, and what a resumed run compares."""
        val = digest_of(self.val.manifest.shards) if self.val else ""
        return {"data": digest_of(self.train.manifest.shards), "val_data": val, "tokenizer": self.tokenizer}

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint records of them."""
        manifest = self.train.manifest
        known: dict[str, Any] = {"tokenizer_file": self.tokenizer_file, "downsample": downsample_of(manifest)}
        known["features"] = asdict(self.online.stored) if self.online else manifest.features
        return self.digests | {name: value for name, value in known.items() if value}

    def validation_batches(self, cfg: RunConfig, ctx: Context, micro_batch: int) -> list[Batch]:
        """This rank's part of the fixed validation images; empty where there is no validation."""
        if self.val is None or not cfg.train.val_every:
            return []
        permuted, place = validates_permuted(cfg, self.train.manifest.samples), (ctx.mesh.data_rank, ctx.mesh.data)
        try:
            return validation_batches(self.val, cfg.train.val_images, micro_batch, *place, permuted=permuted)
        finally:
            self.val.close()

    def close(self) -> None:
        self.train.close()
        if self.val is not None:
            self.val.close()


def open_data(cfg: RunConfig) -> RunData:
    """Open the shards, and check everything about them that can be known before anything is built.

    Sizes of ``cfg.model`` that the user has not set are taken from the run folder, else from the shards.
    """
    name = cfg.data.tokenizer
    expected = tokenizer_hash(cfg.data.tokenizer) if cfg.data.tokenizer and Path(cfg.data.tokenizer).is_file() else None
    if cfg.data.tokenizer and expected is None:
        if problem := no_tokenizer_file(name):
            raise UserError(f"data.tokenizer={problem}")
        raise UserError(f"data.tokenizer={cfg.data.tokenizer} does not exist: name the tokenizer that made the shards")
    train = open_shards(cfg.data.shards, cfg.data)
    manifest = train.manifest
    told = tuple(_take_sizes(cfg, manifest))
    check_manifest(manifest, cfg.model, expected, cfg.views)
    online = open_online(cfg, train)
    if online is None:
        check_features(cfg.repa, manifest, cfg.data.shards)
    elif manifest.features:
        told = (*told, f"repa.online = true: the features that {cfg.data.shards} stores are not read")
    check_enough(cfg.data.shards, manifest, cfg.train.global_batch)
    if name and not manifest.tokenizer_sha256:
        check_downsample(name, manifest, cfg.data.shards)
    file = os.path.abspath(name) if name else ""
    if not cfg.data.val_shards:
        return RunData(train, None, manifest.tokenizer_sha256 or expected or "", file, told, online)
    val = ShardSet(cfg.data.val_shards, data=cfg.data, max_open=1)  # its shards are read one after the other
    check_manifest(val.manifest, cfg.model, expected, 1)
    if val.manifest.classes != manifest.classes:
        raise UserError(
            f"{cfg.data.val_shards} and {cfg.data.shards} name different classes: make both from folders of the same names, or one with --classes of the other"
        )
    if cfg.repa.active and online is None:
        check_same_features(
            manifest.stored_features, val.manifest.stored_features, cfg.data.shards, cfg.data.val_shards
        )
    if note := val.manifest.centre_note:
        told = (*told, f"{cfg.data.val_shards}: {note}")
    hashes = [m.tokenizer_sha256 for m in (manifest, val.manifest)]
    if all(hashes) and hashes[0] != hashes[1]:
        raise UserError(
            f"{cfg.data.shards} was made with the tokenizer {hashes[0][:12]}..., {cfg.data.val_shards} with {hashes[1][:12]}...: pretokenize both with one"
        )
    return RunData(train, val, manifest.tokenizer_sha256 or expected or "", file, told, online)


def downsample_of(manifest: Manifest) -> int:
    """Pixels per token and side; 0 where the shards do not record the size of the images."""
    made_by = manifest.made_by
    if made_by.get("writer") == WRITER and not manifest.tokenizer_sha256 and "image_size" not in made_by:
        return 0  # earlier versions recorded 16 times the grid
    return manifest.image_size // manifest.grid


def check_downsample(tokenizer: str, manifest: Manifest, shards: str) -> None:
    """Raise ``UserError`` if the codes cannot be of ``tokenizer``, for shards that record no hash."""
    config, _ = read_tokenizer_metadata(tokenizer)
    made = downsample_of(manifest)
    if made and made != config.downsample:
        raise UserError(
            f"data.tokenizer={tokenizer} downsamples images by {config.downsample}, but {shards} has {manifest.grid} x "
            f"{manifest.grid} codes of {manifest.image_size} pixels, downsampled by {made}: name the tokenizer that made it"
        )


def _take_sizes(cfg: RunConfig, manifest: Manifest) -> list[str]:
    """Set the sizes that the user has not set; the sentences for the log."""
    if not cfg.model.unset:
        return []
    recorded, where = sizes_of_run(cfg)
    if recorded:
        return take_sizes(cfg, recorded, where)
    sizes, origin = manifest.model_sizes, f"the manifest of {cfg.data.shards}"
    if cfg.train.init and cfg.train.init_classes == "same":  # its table of classes may be larger
        classes = _classes_of(cfg.train)
        if classes > sizes["num_classes"]:
            told = take_sizes(cfg, {"num_classes": classes}, f"train.init = {cfg.train.init}")
            return told + take_sizes(cfg, sizes, origin)
    return take_sizes(cfg, sizes, origin)


def _classes_of(t: TrainConfig) -> int:
    """The number of classes of the weights ``train.init``; 0 where it is unknown: opening them later gives the reason."""
    try:
        path = local_source(t.init)
        if path.is_dir() and not is_hub_folder(path):
            return open_source(path).cfg.model.num_classes
        found = open_weights(path, weights=t.init_weights or None).cfg
    except UserError:
        return 0
    return found.num_classes if isinstance(found, ModelConfig) else 0


def check_same_data(data: DataConfig, restored: dict[str, Any], record: dict[str, Any], found: Path) -> None:
    """Raise ``UserError`` for other shards than the checkpoint's, wherever they lie now.

    ``record``: ``RunData.record`` of those that are there.
    """
    check_same_encoder(restored.get("features"), record.get("features"), data.shards, found)
    digests: dict[str, str] = record
    for name, what, where in (
        ("data", "was trained on", f"data.shards = {data.shards}"),
        ("val_data", "was validated on", f"data.val_shards = {data.val_shards}"),
    ):
        if restored.get(name, digests[name]) != digests[name]:
            raise UserError(
                f"{where} holds different shards than {found} {what}: restore them, or choose another run=..."
            )
    before, now = restored.get("tokenizer", ""), digests.get("tokenizer", "")
    if before and now and before != now:
        raise UserError(
            f"data.tokenizer = {data.tokenizer} has SHA-256 {now[:12]}..., {found} was trained with {before[:12]}...: "
            "restore the file, or choose another run=..."
        )


def check_same_order(window: int, manifest: Manifest, restored: dict[str, Any], found: Path) -> None:
    """Raise ``UserError`` where the checkpoint's samples came in another order: some would be read twice, some never.

    With no more shards than are mixed, all versions of the order are equal.
    """
    shards, order = np.count_nonzero(manifest.shard_sizes), restored.get("order", 1)
    if order != ORDER and shards > window:
        raise UserError(
            f"{found} was trained in sample order {order}, this version of megastar has order {ORDER}: finish that run with the version that started it, or start another run=... from it with train.init={found}"
        )
