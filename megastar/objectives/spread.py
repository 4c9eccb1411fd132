"""How spread out features are over the pictures of a batch: the measure of collapse of SimSiam (arXiv 2011.10566)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.objectives.next_token import at_least_fp32


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Standard deviation over the images of each channel of the L2-normalised features, averaged, times sqrt(D); a scalar.

    features (B, ..., D), B >= 2: compared are images, at the same view and position. 0: all images have one feature.
    About 1: they point in all directions alike. Few images read low: 0.80 of it with two, 0.97 with eight.
    """
    assert len(features) > 1, "one image has no spread"
    unit = F.normalize(at_least_fp32(features.detach()), dim=-1)
    mean: Tensor = unit.std(dim=0).mean()  # over channels, views and positions
    return mean * float(features.shape[-1] ** 0.5)
