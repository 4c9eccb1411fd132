"""Spread of the features over the images of a batch: SimSiam's measure of collapse (arXiv 2011.10566)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.objectives.next_token import at_least_fp32


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Standard deviation over the images of each channel of the L2-normalised features, averaged, times sqrt(D); a scalar.

    features (B, ..., D), B >= 2: images are compared at the same view and position. 0: all images have the same feature.
    About 1: uniform directions. The estimate is low for few images: by a factor of 0.80 for two, 0.97 for eight.
    """
    assert len(features) > 1, "the spread of one image is undefined"
    unit = F.normalize(at_least_fp32(features.detach()), dim=-1)
    mean: Tensor = unit.std(dim=0).mean()  # over channels, views and positions
    return mean * float(features.shape[-1] ** 0.5)
