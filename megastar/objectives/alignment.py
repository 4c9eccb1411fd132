"""Representation alignment: REPA (arXiv 2410.06940) for next-token prediction, as LlamaGen-REPA in GEAR (arXiv 2606.32039).

N sequences, S = T positions, P aligned patches, D width of the network, C width of the encoder. Output t predicts token t,
and input position t holds token t - 1, or the class for t = 0. ``match`` decides which patch a position is aligned with:

    next    position t with patch t, whose token it predicts; P = T
    input   position t with patch t - 1, whose token it reads; the class position and the last patch, which is no input,
            have no partner; P = T - 1
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megastar.objectives.next_token import at_least_fp32


def output_positions(features: Tensor, match: str) -> Tensor:
    """Features of all positions (N, S, D) -> those of the aligned ones (N, P, D)."""
    return features if match == "next" else features[:, 1:]


def target_patches(features: Tensor, match: str) -> Tensor:
    """The encoder's features of all patches (..., T, C) in raster order -> those of the aligned ones (..., P, C)."""
    return features if match == "next" else features[..., :-1, :]


def alignment_loss(projected: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over sequences and patches of 1 - cosine, in fp32. No gradient reaches the targets.

    projected (N, P, C), the student's features through the projector; targets (N, P, C), the encoder's, at the same places.
    REPA's loss is the negative cosine, which differs by a constant. Returns (scalar, metrics).
    """
    assert projected.shape == targets.shape, (projected.shape, targets.shape)
    similarity = F.cosine_similarity(at_least_fp32(projected), at_least_fp32(targets.detach()), dim=-1)  # (N, P)
    loss = 1 - similarity.mean()
    return loss, {"loss_repa": loss.detach()}
