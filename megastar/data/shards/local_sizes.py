"""Sizes of the model that training would take from the shards, for commands that start no training."""

from __future__ import annotations

from pathlib import Path

from megastar.config.model_sizes import SIZES_OF_DATA, take_sizes
from megastar.config.schema import RunConfig
from megastar.run_dir.config_file import sizes_of_run


def take_local_sizes(cfg: RunConfig) -> str:
    """Set the unset sizes from the run folder or the shards, if these are on this machine; returns a sentence about them.

    So is ``repa.width``, which needs no sentence. Raises ``UserError`` for a record that cannot be read.
    """
    _take_width(cfg)
    if not cfg.model.unset:
        return ""
    recorded, where = sizes_of_run(cfg)
    shards = cfg.data.shards
    if not recorded and shards and Path(shards).is_dir():
        # Imported here: megastar plan answers without numpy where it can.
        from megastar.data.shards.manifest import load_manifest
        from megastar.data.storage.shard_info import MANIFEST

        if (Path(shards) / MANIFEST).is_file():
            recorded, where = load_manifest(shards).model_sizes, f"the manifest of {shards}"
    if recorded:
        return "; ".join(take_sizes(cfg, recorded, where))
    names = [f"model.{name} = {getattr(cfg.model, name)}" for name in SIZES_OF_DATA if name in cfg.model.unset]
    return f"{', '.join(names)}: defaults; training takes them from the manifest of data.shards"


def _take_width(cfg: RunConfig) -> None:
    """Set ``repa.width`` from the shards, if these are on this machine and store features."""
    folder = Path(cfg.data.shards)
    if cfg.repa.active and not cfg.repa.width and cfg.data.shards and folder.is_dir():
        from megastar.data.shards.manifest import load_manifest
        from megastar.data.storage.shard_info import MANIFEST

        if (folder / MANIFEST).is_file() and (stored := load_manifest(folder).stored_features):
            cfg.repa.width = stored.width
