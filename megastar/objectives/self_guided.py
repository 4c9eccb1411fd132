"""ST-AR's objective (arXiv 2509.15185): L = L_AR + alpha * L_MIM + beta * (L_step + L_view) / 2.

B images of this rank, M views, M_s student views, N = B * M_s sequences (row b * M_s + m is view m of image b),
S = T positions, K sampled positions, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megastar.config.schema import SelfGuidedConfig
from megastar.objectives.contrastive import Gather, identity, step_loss, view_loss
from megastar.objectives.masked_image import masked_image_loss
from megastar.objectives.spread import feature_spread

_STREAM = int.from_bytes(b"position", "big")  # makes these random numbers independent of other uses of the run's seed


def draw_positions(seed: int, step: int, tokens: int, count: int) -> Tensor:
    """The step's sampled positions: (K,) int64, sorted, distinct, in 1..T - 1. A pure function of (seed, step).

    Position 0 is excluded [C]: its input is only the class, so its feature is the same for all images of a class.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, 0, step]))
    return torch.from_numpy(1 + np.sort(rng.choice(tokens - 1, count, replace=False)))


def rows_at(features: Tensor, positions: Tensor) -> Tensor:
    """Features of N sequences (N, S, D) at positions (K,), or (N, K) of each -> (N, K, D)."""
    positions = positions.to(features.device)
    if positions.ndim == 1:
        return features[:, positions]
    return features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))


def at_positions(features: Tensor, positions: Tensor, views: int) -> Tensor:
    """Features of all sequences (B * M, S, D) at positions (K,), or (B * M, K) of each -> (B, M, K, D)."""
    chosen = rows_at(features, positions)  # (B * M, K, D)
    return chosen.view(-1, views, *chosen.shape[1:])


def total(
    cfg: SelfGuidedConfig,
    *,
    loss_ar: Tensor,
    student_last: Tensor | None = None,
    teacher_last: Tensor | None = None,
    anchors: Tensor | None = None,
    targets: Tensor | None = None,
    gather: Gather = identity,
    rank_offset: int = 0,
    spreads: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its parts.

    loss_ar is L_AR of the masked student (next_token.py); student_last and teacher_last (N, S, D), the same sequences
    through both networks, feed L_MIM; anchors (B, M_s, K, D), projected student features, and targets
    (B, M, K, D), raw teacher features, feed the contrastive losses, ``gather`` and ``rank_offset`` as in
    contrastive.py. A disabled term (``enabled``, weight 0, ``step_loss``, ``view_loss``) is not computed, contributes
    zero to the sum and is absent from the metrics.

    Returns (scalar, detached scalars among loss, loss_ar, loss_mim, loss_step, loss_view, acc_step, acc_view), and with
    ``spreads`` spread_student and spread_teacher (spread.py) of all ranks' anchors and targets, if there are two images.
    """
    loss, metrics = loss_ar, {"loss_ar": loss_ar.detach()}
    if cfg.enabled and cfg.alpha:
        assert student_last is not None and teacher_last is not None
        mim, values = masked_image_loss(student_last, teacher_last)
        loss = loss + cfg.alpha * mim
        metrics |= values
    if cfg.enabled and cfg.beta and (cfg.step_loss or cfg.view_loss):
        assert anchors is not None and targets is not None
        all_targets = gather(targets.detach())  # once for both losses
        terms = {"step": step_loss} if cfg.step_loss else {}
        terms |= {"view": view_loss} if cfg.view_loss else {}
        for name, term in terms.items():
            value, values = term(anchors, targets, cfg.temperature, lambda _: all_targets, rank_offset)
            loss = loss + cfg.beta / 2 * value
            metrics |= {f"loss_{name}": value.detach(), f"acc_{name}": values["accuracy"]}
        if spreads and len(all_targets) > 1:
            metrics["spread_student"] = feature_spread(gather(anchors.detach()))
            metrics["spread_teacher"] = feature_spread(all_targets)
    return loss, {"loss": loss.detach()} | metrics
