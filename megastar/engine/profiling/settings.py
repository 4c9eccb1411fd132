"""The check of ``train.profile`` against the launch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from megastar.config.schema import ProfileConfig
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.utils.launcher import place_of

logger = logging.getLogger(__name__)


def check_ranks(profile: ProfileConfig, world: int, run: str | Path, *, elastic: bool = False) -> None:
    """Raise ``UserError`` for a rank that this launch does not have, unless the folder ``run`` has a checkpoint after the
    profiled steps.

    ``elastic``: the number of ranks changes with the nodes, so a missing rank only logs a warning, on rank 0.
    """
    unknown = [rank for rank in profile.ranks if rank >= world]
    if not profile.steps or not unknown:
        return
    saved = checkpoint_dir.latest(checkpoint_dir.folder_of(run))
    if saved is not None and checkpoint_dir.step_in(saved) >= profile.start + profile.steps:
        return
    has = "only rank 0" if world == 1 else f"the ranks 0 to {world - 1}"
    if not elastic:
        raise UserError(
            f"train.profile.ranks = {profile.ranks}: rank {unknown[0]} does not exist, this run has {has}: name some of these"
        )
    if place_of(os.environ).rank == 0:
        lacking = ", ".join(map(str, unknown))
        logger.warning("train.profile.ranks: rank %s is not profiled, this start has %s", lacking, has)
