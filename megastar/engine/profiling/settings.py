"""The check of ``train.profile`` against the launch."""

from __future__ import annotations

from megastar.config.schema import ProfileConfig
from megastar.errors import UserError


def check_ranks(profile: ProfileConfig, world: int) -> None:
    """Raise ``UserError`` for a rank that this launch does not have."""
    unknown = [rank for rank in profile.ranks if rank >= world]
    if profile.steps and unknown:
        has = "only rank 0" if world == 1 else f"the ranks 0 to {world - 1}"
        raise UserError(
            f"train.profile.ranks = {profile.ranks}: rank {unknown[0]} does not exist, this run has {has}: name some of these"
        )
