"""L_step and L_view: InfoNCE between projected student features and teacher features at K sampled positions.

B images of this rank, B_global images of all data-parallel ranks, M views, M_s student views (the first M_s of the
M), K positions, P pairs, D width. The other images of the global batch are the negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.objectives.next_token import at_least_fp32

Gather = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The gather of a single process."""
    return x


def step_loss(
    anchors: Tensor, targets: Tensor, temperature: float, gather: Gather = identity, rank_offset: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Agreement of the positions of one view: anchor at position i, positive at j != i of the same view and image.

    anchors (B, M_s, K, D) projected student; targets (B, M, K, D) teacher, no gradient; K >= 2. ``gather`` maps
    (B, ...) to (B_global, ...) in rank order, without gradient; the positive of anchor b is row rank_offset * B + b.
    Averaged over images, student views and the K (K - 1) ordered pairs. Returns (scalar, {"accuracy"}); the accuracy
    is the share of anchors whose positive has the largest logit.
    """
    views, positions = anchors.shape[1:3]
    assert positions >= 2, "the step loss requires two positions"
    anchors, targets = _unit(anchors), _unit(gather(targets.detach())[:, :views])
    every = torch.einsum("bmid,cmjd->mijbc", anchors, targets) / temperature  # (M_s, K, K, B, B_global)
    i, j = _pairs(positions, positions, anchors.device)  # (P,) each
    return _info_nce(every[:, i, j], rank_offset)  # (M_s, P, B, B_global)


def view_loss(
    anchors: Tensor, targets: Tensor, temperature: float, gather: Gather = identity, rank_offset: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Agreement of the views of one image: anchor at position k of view m, positive at k of another view n of the image.

    Arguments and results as in ``step_loss``; M >= 2. Averaged over images, positions and the ordered pairs (m, n) of a
    student view m and a teacher view n.
    """
    student_views, views = anchors.shape[1], targets.shape[1]
    assert views >= 2, "the view loss requires two views"
    anchors, targets = _unit(anchors), _unit(gather(targets.detach()))
    m, n = _pairs(student_views, views, anchors.device)  # (P,) each
    logits = torch.einsum("bpkd,cpkd->pkbc", anchors[:, m], targets[:, n]) / temperature  # (P, K, B, B_global)
    return _info_nce(logits, rank_offset)


@lru_cache(maxsize=32)
def _pairs(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs of different indices, (P,) int64 each; cached, since creating them on a GPU would sync the host."""
    with torch.inference_mode(False):
        i, j = (torch.arange(rows)[:, None] != torch.arange(columns)).nonzero(as_tuple=True)
        return i.to(device), j.to(device)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(x), dim=-1)


def _info_nce(logits: Tensor, rank_offset: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of logits (..., B, B_global) whose positives start at column rank_offset * B."""
    batch, global_batch = logits.shape[-2:]
    labels = torch.arange(batch, device=logits.device) + rank_offset * batch
    labels = labels.expand(logits.shape[:-1]).flatten()
    logits = logits.reshape(-1, global_batch)
    accuracy = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}
