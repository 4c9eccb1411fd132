"""Features of a frozen encoder that a set of shards stores beside the codes: what they are, as ``manifest.json`` records it.

A sample's features are ``KEY.features.npy``, float16: (views, P, C) in the layout plain, (n, views, P, C) of a block in the
layout packed. P patches in raster order, one a token; C is the encoder's width. View v is of the crop of view v's codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megastar.config.sections.repa import RepaConfig
from megastar.errors import UserError
from megastar.utils.files import sha256
from megastar.utils.weights.weight_parts import weights_sha256

DTYPE, NUMPY = "float16", np.dtype("<f2")
MOST_WIDTH, MOST_GRID = 65536, 1024
_MAX_NAME = 300
_EXPONENT = np.uint16(0x7C00)  # of float16: all its bits are set in infinities and NaN


@dataclass(frozen=True)
class StoredFeatures:
    """The field ``features`` of a manifest."""

    encoder: str  # efflite0, dinov2, dinov3, or module:function
    weights_sha256: str  # of the file of its weights, or of the function's source
    layer: str  # what is taken from the network
    grid: int  # side of the grid of patches, that of the tokens
    width: int  # C
    pool: int = 1  # patches of the encoder that were averaged in each direction
    dtype: str = DTYPE

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def bytes(self) -> int:
        """Of one crop."""
        return self.patches * self.width * NUMPY.itemsize

    def __str__(self) -> str:
        return (
            f"{self.encoder} ({self.layer}), {self.grid} x {self.grid} x {self.width} {self.dtype}, "
            f"weights {self.weights_sha256[:12]}..."
        )


def stored_features(record: Mapping[str, Any]) -> StoredFeatures | None:
    """The features that a manifest records; None for an empty record. Raises ``ValueError`` for an impossible one."""
    if not record:
        return None
    kinds = {"str": str, "int": int}
    for f in fields(StoredFeatures):
        if type(value := record.get(f.name)) is not kinds[str(f.type)]:
            raise ValueError(f"features.{f.name} is {value!r:.80}, not of type {f.type}")
    made = StoredFeatures(**{f.name: record[f.name] for f in fields(StoredFeatures)})
    if made.dtype != DTYPE:
        raise ValueError(f"features have dtype {made.dtype!r:.80}, this version of megastar reads {DTYPE}")
    if not (1 <= made.grid <= MOST_GRID and 1 <= made.width <= MOST_WIDTH and 1 <= made.pool <= MOST_GRID):
        raise ValueError(f"features have a grid of {made.grid}, a width of {made.width} and a pool of {made.pool}")
    if not re.fullmatch("[0-9a-f]{64}", made.weights_sha256) or not 0 < len(made.encoder) <= _MAX_NAME:
        raise ValueError(f"features are of encoder {made.encoder!r:.80} with SHA-256 {made.weights_sha256!r:.80}")
    if len(made.layer) > _MAX_NAME or not (made.encoder + made.layer).isprintable():
        raise ValueError(f"features are of encoder {made.encoder!r:.80}, layer {made.layer!r:.80}")
    return made


def not_finite(features: np.ndarray) -> np.ndarray:
    """(B, ...) float16 -> (B,) bool: whether a row holds an infinity or NaN."""
    bits = features.view(np.uint16).reshape(len(features), -1)
    return np.asarray(((bits & _EXPONENT) == _EXPONENT).any(axis=1))


def check_same_features(one: StoredFeatures | None, other: StoredFeatures | None, here: str, there: str) -> None:
    """Raise ``UserError`` if two sets have features that differ; a set without features fits each."""
    if one is not None and other is not None and one != other:
        raise UserError(
            f"{here} has features of {one}, {there} of {other}: make both with the same encoder, weights and grid"
        )


def check_usable(
    repa: RepaConfig, stored: StoredFeatures | None, where: str, other_codes: str = "", again: str = "pretokenize again"
) -> StoredFeatures:
    """The features ``stored`` of a set of shards, if the run of ``repa`` can read them.

    Args:
        where: the set, for errors: its field and folder.
        other_codes: what to do about a set without features; empty: make it again.
        again: what to do about a set with features of another encoder.

    Raises ``UserError`` for none, and for those of another encoder, other weights or another width.
    """
    if stored is None:
        other_codes = other_codes or "make the set again with megastar pretokenize --features"
        raise UserError(
            f"{where} stores no features, which repa.enabled needs: {other_codes}, compute them in training (repa.online), or "
            "set repa.enabled=false"
        )
    if repa.encoder and repa.encoder != stored.encoder:
        raise UserError(
            f"repa.encoder = {repa.encoder}, but {where} has features of {stored}: name that encoder, or {again}"
        )
    if repa.encoder_weights:
        if not Path(repa.encoder_weights).is_file():
            raise UserError(f"repa.encoder_weights = {repa.encoder_weights} does not exist: name the encoder's weights")
        custom = ":" in stored.encoder  # a user's function may read a file of any format
        digest = sha256(Path(repa.encoder_weights)) if custom else weights_sha256(repa.encoder_weights)
        if digest != stored.weights_sha256:
            raise UserError(
                f"repa.encoder_weights = {repa.encoder_weights} has SHA-256 {digest[:12]}..., but {where} has features of "
                f"{stored}: name the file that they were made with, or {again}"
            )
    if repa.width and repa.width != stored.width:
        raise UserError(
            f"repa.width = {repa.width}, but {where} has features of {stored}: set it to {stored.width}, or to 0"
        )
    return stored
