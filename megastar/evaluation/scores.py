"""From collected features to named numbers, and the fewest pictures that each number needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.features import Network
from megastar.evaluation.frechet import finite_sample_floor, frechet_distance
from megastar.evaluation.inception import POOL
from megastar.evaluation.inception_score import inception_score
from megastar.evaluation.kid import kernel_distance
from megastar.evaluation.prdc import precision_recall
from megastar.evaluation.reference import Reference

METRICS = ("fid", "sfid", "is", "pr", "kid", "fd")
FEWEST = 5000  # below it FD of 1280 features is too noisy to compare with runs of another count
USUAL = 50_000  # what papers draw
FLOOR_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What a score depends on besides pictures and network; part of the result."""

    is_split: int = 5000
    k: int = 3
    kid_subsets: int = 100
    kid_size: int = 1000
    seed: int = 0
    allow_few: bool = False  # score fewer pictures than a metric needs, with a warning: for trying things out


def choose_metrics(words: Sequence[str] | None, network: Network) -> tuple[str, ...]:
    """The metrics to compute: all of ADM's suite with Inception, the Frechet distance without, unless named."""
    if words is None:
        return ("fid", "sfid", "is", "pr") if "fid" in network.metrics else ("fd",)
    for word in words:
        if word not in METRICS:
            raise UserError(f"metric {word!r} is unknown: choose from {', '.join(METRICS)}")
        if word not in network.metrics:
            more = "" if "fid" in network.metrics else "; fid, sfid and is need --inception FILE"
            raise UserError(f"metric {word!r} is not one of these features' ({', '.join(network.metrics)}){more}")
    return tuple(dict.fromkeys(words))


def needs(metrics: Sequence[str], *, real: bool) -> dict[str, bool]:
    """What a ``Collector`` must gather: its ``keep`` and ``spatial``."""
    kept = {"pr", "kid", "fd"} if real else {"pr", "kid", "is"}  # fd's floor takes halves of the real set
    return {"keep": bool(kept & set(metrics)), "spatial": "sfid" in metrics}


def fewest_pictures(metric: str, network: Network, s: Settings) -> int:
    """How many pictures a metric needs of each set to mean anything."""
    wanted = {
        "fid": POOL + 1,  # else the covariance of that many features is singular
        "sfid": network.spatial_dim + 1,
        "is": s.is_split,
        "pr": s.k + 1,
        "kid": s.kid_size,
        "fd": 4,
    }
    least = {"pr": s.k + 1, "fd": 4}
    return least.get(metric, 2) if s.allow_few else wanted[metric]


def check_count(metrics: Sequence[str], network: Network, s: Settings, count: int, where: object) -> None:
    """Raises ``UserError`` naming the metric, what it needs and what there is."""
    for metric in metrics:
        least = fewest_pictures(metric, network, s)
        if count < least:
            hint = "" if s.allow_few or metric in ("fd", "pr") else "; --allow-few scores anyway, to try things out"
            raise UserError(
                f"{where}: {count} pictures cannot be scored, {metric} needs {least}; {FEWEST} or more give a score worth "
                f"reporting, and papers draw {USUAL}{hint}"
            )


def check_real(metrics: Sequence[str], network: Network, s: Settings, real: Reference) -> None:
    """As ``check_count``, where the real side is not published moments, whose count nobody checks."""
    own = [m for m in metrics if m != "is" and (m in ("pr", "kid") or not real.published)]
    check_count(own, network, s, real.count, real.about["source"])


def compute(
    made: Collector, real: Reference, metrics: Sequence[str], s: Settings = Settings()
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Named scores, what else there is to say about them (spreads, floor), and warnings."""
    network, features = made.network, made.features if made.keep else None
    scores: dict[str, float] = {}
    details: dict[str, Any] = {}
    name = network.name
    for metric in metrics:
        if metric in ("fid", "fd"):
            scores[name(metric)] = frechet_distance(real.stats, made.stats)
        elif metric == "sfid":
            assert real.spatial is not None
            scores[name(metric)] = frechet_distance(real.spatial, made.spatial_stats)
        elif metric == "is":
            assert features is not None
            logits = network.logits(torch.from_numpy(features).to(network.device))
            assert logits is not None
            scores[name(metric)], details[name("is") + "_std"] = inception_score(logits, s.is_split)
        elif metric == "pr":
            assert real.features is not None and features is not None
            pair = (torch.from_numpy(x).to(network.device) for x in (real.features, features))
            scores[name("precision")], scores[name("recall")] = precision_recall(*pair, k=s.k)
        elif metric == "kid":
            assert real.features is not None and features is not None
            size = min(s.kid_size, made.count, len(real.features))
            mean, std = kernel_distance(
                real.features, features, subsets=s.kid_subsets, size=size, seed=s.seed
            )  # fmt: skip
            scores[name(metric)], details[name("kid") + "_std"] = mean, std
    if "fd" in metrics:
        assert real.features is not None
        floor, half = finite_sample_floor(real.features, FLOOR_SEED)
        details |= {
            "floor": floor,
            "floor_meaning": f"{name('fd')} between two disjoint halves of the real set, {half} pictures each",
            "floor_seed": FLOOR_SEED,
        }
    return scores, details, _warnings(made, real, metrics, s)


def _warnings(made: Collector, real: Reference, metrics: Sequence[str], s: Settings) -> list[str]:
    few = [
        f"only {n} {what} pictures: below {FEWEST} the distance is biased upward, compare equal counts only"
        for n, what in ((made.count, "scored"), (real.count, "real"))
        if n < FEWEST and not (what == "real" and real.published)
    ]
    for metric in metrics:
        least = fewest_pictures(metric, made.network, Settings(s.is_split, s.k, s.kid_subsets, s.kid_size))
        if min(made.count, made.count if metric == "is" or real.published else real.count) < least:
            few.append(f"{metric} needs {least} pictures to mean anything")
    if real.published and not made.network.describe().get("published"):
        few.append("mu and sigma of the reference are the published Inception's, the pictures' features another file's")
    if "fid" in metrics and made.count != USUAL:
        few.append(f"FID of {made.count} pictures: papers' numbers are of {USUAL}")
    return few
