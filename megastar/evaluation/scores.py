"""From collected features to named scores, and the minimum number of images of each score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.features import Network
from megastar.evaluation.frechet import finite_sample_floor, frechet_distance
from megastar.evaluation.inception import POOL
from megastar.evaluation.inception_score import inception_score
from megastar.evaluation.kid import kernel_distance
from megastar.evaluation.options import Settings
from megastar.evaluation.prdc import precision_recall
from megastar.evaluation.reference import Reference

METRICS = ("fid", "sfid", "is", "pr", "kid", "fd", "fd_dinov2")
FRECHET = ("fd", "fd_dinov2")  # with a floor: the distance between halves of the real set
REPORTABLE = 5000  # with fewer, FD of 1280 features is too noisy to compare with runs of another count
SETTING_OF = {"is_split": "is", "kid_subsets": "kid", "kid_size": "kid"}  # the metric that it belongs to
USUAL = 50_000  # in papers
FLOOR_SEED = 0


def choose_metrics(words: Sequence[str] | None, network: Network) -> tuple[str, ...]:
    """The metrics to compute; by default ADM's suite with Inception, the Frechet distance with other features."""
    if words is None:
        return ("fid", "sfid", "is", "pr") if "fid" in network.metrics else network.metrics[:1]
    for word in words:
        if word not in METRICS:
            raise UserError(f"unknown metric {word!r}: choose from {', '.join(METRICS)}")
        if word not in network.metrics:
            hint = "; fd_dinov2 requires --dinov2 FILE" if word == "fd_dinov2" else ""
            hint += "" if "fid" in network.metrics else "; fid, sfid and is require --inception FILE"
            raise UserError(
                f"metric {word!r} is not available with these features: use {', '.join(network.metrics)}{hint}"
            )
    return tuple(dict.fromkeys(words))


def needs(metrics: Sequence[str], *, real: bool) -> dict[str, bool]:
    """The ``keep`` and ``spatial`` that a ``Collector`` must have."""
    kept = {"pr", "kid", *FRECHET} if real else {"pr", "kid", "is"}  # fd's floor uses halves of the real set
    return {"keep": bool(kept & set(metrics)), "spatial": "sfid" in metrics}


def min_images(metric: str, network: Network, s: Settings) -> int:
    """The number of images of each set that a metric requires."""
    if s.allow_few:
        return {"pr": s.k + 1, "fd": 4, "fd_dinov2": 4}.get(metric, 2)
    return {
        "fid": POOL + 1,  # with fewer, the covariance is singular
        "sfid": network.spatial_dim + 1,
        "is": s.is_split,
        "pr": s.k + 1,
        "kid": s.kid_size,
        "fd": 4,
        "fd_dinov2": getattr(network, "dim", 0) + 1,
    }[metric]


def check_count(metrics: Sequence[str], network: Network, s: Settings, count: int, where: object) -> None:
    """Raises ``UserError`` if a metric requires more than ``count`` images."""
    for metric in metrics:
        required = min_images(metric, network, s)
        if count < required:
            hint = "" if s.allow_few or metric in ("fd", "pr") else "; for a test, pass --allow-few"
            raise UserError(
                f"{where}: {count} images, but {metric} requires {required}; use {REPORTABLE} or more for a score to report "
                f"({USUAL} in papers){hint}"
            )


def check_real(metrics: Sequence[str], network: Network, s: Settings, real: Reference) -> None:
    """``check_count`` of the real set, except for published moments, which have no count."""
    checked = [m for m in metrics if m != "is" and (m in ("pr", "kid") or not real.published)]
    check_count(checked, network, s, real.count, real.metadata["source"])


def compute(
    made: Collector, real: Reference, metrics: Sequence[str], s: Settings
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Named scores, details of them (standard deviations, floor), and warnings."""
    network, features = made.network, made.features if made.keep else None
    scores: dict[str, float] = {}
    details: dict[str, Any] = {}
    name = network.name
    for metric in metrics:
        if metric == "fid" or metric in FRECHET:
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
            a, b = (torch.from_numpy(x).to(network.device) for x in (real.features, features))
            scores[name("precision")], scores[name("recall")] = precision_recall(a, b, k=s.k)
        elif metric == "kid":
            assert real.features is not None and features is not None
            size = min(s.kid_size, made.count, len(real.features))
            mean, std = kernel_distance(real.features, features, subsets=s.kid_subsets, size=size, seed=s.seed)
            scores[name(metric)], details[name("kid") + "_std"] = mean, std
    if found := [m for m in metrics if m in FRECHET]:
        assert real.features is not None
        floor, half = finite_sample_floor(real.features, FLOOR_SEED)
        details |= {
            "floor": floor,
            "floor_meaning": f"{name(found[0])} between two disjoint halves of the real set, {half} images each",
            "floor_seed": FLOOR_SEED,
        }
    return scores, details, warnings_of(made, real, metrics, s)


def warnings_of(
    made: Collector, real: Reference, metrics: Sequence[str], s: Settings, what: str = "generated"
) -> list[str]:
    """What limits the scores of ``made`` against ``real``: too few images, settings without effect, another Inception file.

    ``what``: the kind of images that ``made`` holds, for the sentences.
    """
    out = [
        f"only {n} {kind} images: below {REPORTABLE} the distance is biased upward; compare equal counts only"
        for n, kind in ((made.count, what), (real.count, "real"))
        if n < REPORTABLE and not (kind == "real" and real.published)
    ]
    for name, metric in SETTING_OF.items():
        if metric not in metrics and (value := getattr(s, name)) != getattr(Settings(), name):
            out.append(
                f"{name} = {value} has no effect: the metric '{metric}' is not computed (metrics: {', '.join(metrics)})"
            )
    for metric in metrics:
        required = min_images(metric, made.network, replace(s, allow_few=False))
        if min(made.count, made.count if metric == "is" or real.published else real.count) < required:
            out.append(f"{metric} is meaningful only with {required} or more images")
    if real.published and not made.network.describe().get("published"):
        out.append(
            "the reference's mu and sigma are from the published Inception file, the images' features from another"
        )
    for metric in ("fid", "fd_dinov2"):
        if metric in metrics and made.count != USUAL:
            out.append(f"{made.network.name(metric)} of {made.count} images: papers use {USUAL}")
    return out
