"""The features of representation alignment: stored in the shards, by the encoder that the run names, or computed from images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megastar.config.schema import RunConfig
from megastar.config.sections.repa import RepaConfig
from megastar.data.online_features import OnlineFeatures
from megastar.data.shards.features import check_usable, stored_features
from megastar.data.shards.manifest import Manifest
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError


def check_features(repa: RepaConfig, manifest: Manifest, shards: str) -> None:
    """Set ``repa.width`` from the shards where it is 0. Does nothing without alignment.

    Raises ``UserError`` for shards without features, or with those of another encoder, other weights or another width.
    """
    if not repa.active:
        return
    repa.width = check_usable(repa, manifest.stored_features, f"data.shards = {shards}").width


def open_online(cfg: RunConfig, shards: ShardSet) -> OnlineFeatures | None:
    """The features that ``repa.online`` computes, with ``repa.width`` set from them where it is 0; None without it.

    Raises ``UserError`` for images that are not those of the shards, errors of the encoder, and another width.
    """
    repa = cfg.repa
    if not (repa.active and repa.online):
        return None
    online = OnlineFeatures(repa, shards, cfg.data.tokenizer)
    if repa.width and repa.width != online.stored.width:
        raise UserError(
            f"repa.width = {repa.width}, but features of {online.stored} are computed: set it to {online.stored.width}, or to 0"
        )
    repa.width = online.stored.width
    return online


def check_same_encoder(recorded: Any, now: Any, shards: str, found: Path) -> None:
    """Raise ``UserError`` for features other than those that the checkpoint ``found`` records. An older checkpoint, or one of
    shards without features, records none."""
    if recorded and recorded != now:
        try:
            before = stored_features(recorded)
        except (AttributeError, TypeError, ValueError):
            before = None
        here = stored_features(now or {})
        raise UserError(
            f"data.shards = {shards} has {f'features of {here}' if here else 'no features'}, {found} was trained on shards with "
            f"features of {before or 'an encoder that it does not name'}: restore them, or choose another run=..."
        )
