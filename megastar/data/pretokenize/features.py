"""The encoder whose patch features are stored beside the codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal

from megastar.data.shards.features import MOST_WIDTH, StoredFeatures, not_finite
from megastar.data.shards.manifest import Manifest
from megastar.encoders.spatial import open_encoder, pool_of, pooled
from megastar.errors import UserError


class FeatureEncoder:
    """uint8 crops (N, size, size, 3) -> features (N, P, C) float16 of one patch a token; ``stored`` describes them.

    Raises ``UserError``, here, for an unknown encoder, unusable weights, and a grid that does not match the tokens', and
    on a call for features that float16 cannot hold.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None,
        device: torch.device,
        grid: int,
        image_size: int,
        average: bool = False,
    ):
        self.encoder, self.grid = open_encoder(name, weights, device), grid
        trial = self.encoder(torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8), grid)  # (1, patches, C)
        pool, width = pool_of(trial.shape[1], grid, image_size, name, average), trial.shape[2]
        if width > MOST_WIDTH:
            raise UserError(f"encoder {name} has features of width {width}: shards store at most {MOST_WIDTH}")
        about = {
            "encoder": self.encoder.name,
            "weights_sha256": self.encoder.weights_sha256,
            "layer": self.encoder.layer,
        }
        self.stored = StoredFeatures(**about, grid=grid, width=width, pool=pool)

    def __call__(self, crops: torch.Tensor) -> np.ndarray:
        """Raises ``UserError`` for values that are not finite in float16, and for another shape than at the start."""
        features = self.encoder(crops, self.grid)
        wanted = ((self.grid * self.stored.pool) ** 2, self.stored.width)
        if features.shape[1:] != wanted:
            shape = tuple(features.shape[1:])
            raise UserError(f"encoder {self.stored.encoder} returned features {shape}, at the start {wanted} (P, C)")
        stored = pooled(features, self.grid, self.stored.pool).half().cpu().numpy()
        if not_finite(stored).any():
            raise UserError(
                f"encoder {self.stored.encoder} returned values that are not finite in float16 (up to 65504): scale them"
            )
        return stored


def bytes_of_image(m: Manifest) -> int:
    """The bytes of the codes and the features of an image in a set of ``m``, without the headers of the shards."""
    stored = m.stored_features
    return m.views * (m.tokens * np.dtype(m.dtype).itemsize + (stored.bytes if stored else 0))


def size_of_features(stored: StoredFeatures, views: int, images: int) -> str:
    """A sentence about the space that the features take."""
    image = views * stored.bytes
    return (
        f"features of {stored}: {decimal(stored.bytes)} a crop, {decimal(image)} an image of {views} crops, "
        f"{decimal(images * image)} for {images} images"
    )
