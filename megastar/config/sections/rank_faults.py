"""The fields about hung and lost ranks, of every training on several ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import MOST_SECONDS, knob


@dataclass
class RankFaultsConfig:
    """What happens when a rank hangs, is lost or does not join (docs/faults.md)."""

    hang_timeout: float = knob(
        600.0,
        "seconds without progress after which the watchdog of each rank writes all stacks and ends the rank; 0: never",
        low=0,
        high=MOST_SECONDS,
    )
    lost_timeout: float = knob(
        60.0,
        "seconds without a heartbeat after which a rank counts as lost; the others name it and end; 0: never",
        low=0,
        high=MOST_SECONDS,
    )
    join_timeout: float = knob(
        600.0,
        "seconds that a starting rank waits for the others to join; then it names them and ends",
        low=1,
        high=MOST_SECONDS,
    )
