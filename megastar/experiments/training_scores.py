"""Which scores of samples that were drawn while a run trained are of the settings of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megastar.config.comparison import CompareConfig
from megastar.errors import UserError
from megastar.experiments.plan import codes_folder
from megastar.run_dir.evaluations import LABELS, same_protocol

logger = logging.getLogger(__name__)
METRICS = {"fd": "FD-EffLite0", "fid": "FID", "fd_dinov2": "FD-DINOv2"}  # eval.metric -> how its name begins


def is_of(scored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a line of evaluations.jsonl was made with the settings of ``wanted``: an earlier start may have had others."""
    metric = wanted["metric"]
    if not str(scored.get("metric", "")).startswith(metric):
        return False
    return same_protocol({**scored, "metric": metric}, wanted)


def wanted_scores(cfg: CompareConfig) -> dict[str, Any]:
    """The settings of ``base.eval`` as a line of evaluations.jsonl records them, for ``is_of``.

    If the reference cannot be read, it has no hash: lines are then compared by its path, with a warning.
    """
    from megastar.data.shards.manifest import load_manifest
    from megastar.evaluation.image_sources import open_images, source_hash

    e, data, shards = cfg.base.eval, cfg.base.data, codes_folder(cfg, "train")
    out: dict[str, Any] = {"metric": METRICS[e.metric], "samples": e.samples, "cfg_scale": e.cfg_scale}
    out |= {"weights": e.weights, "against": e.against or shards}
    try:
        counts = load_manifest(shards, data).class_counts
        out["labels"] = LABELS["data" if e.labels == "data" and any(counts) else "balanced"]
        subset = e.against_subset or None
        if e.against:
            out["reference"] = {"sha256": source_hash(e.against, subset=subset), "subset": subset}
        else:
            images = open_images(shards, tokenizer=data.tokenizer, limit=e.against_images or None, data=data)
            out["reference"] = {"sha256": images.sha256(), "subset": None, "pictures": images.count}
    except (UserError, OSError) as error:
        logger.warning(
            "the reference of base.eval cannot be read (%s): scores while training are compared by its path, %s",
            error, out["against"],
        )  # fmt: skip
    return out
