"""What the evaluations of a run use: reference, classes and networks; checked before the run starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megastar.config.rules.evaluation import unused_thresholds
from megastar.config.schema import RunConfig
from megastar.config.sections.evaluation import EvaluationConfig
from megastar.data.shards.manifest import Manifest
from megastar.engine.evaluation.random_state import kept_random_state
from megastar.engine.input_pipeline.data_checks import RunData
from megastar.errors import UserError
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.image_sources import NPZ_NAMES, check_applicable, npz_names, open_images
from megastar.evaluation.options import Settings
from megastar.evaluation.scores import check_count
from megastar.run_dir.evaluations import LABELS, read_evaluations
from megastar.sampling.distributed import labels_like, plan_labels
from megastar.tokenizer.io import read_tokenizer_metadata

logger = logging.getLogger(__name__)


def open_reference_network(e: EvaluationConfig, device: torch.device | str = "cpu") -> Network:
    """The network of ``eval.metric``. Raises ``UserError`` for a file that is missing or wrong."""
    features = {"fd": "efflite0", "fid": "inception", "fd_dinov2": "dinov2"}[e.metric]
    return open_network(features, device, inception=e.inception or None, dinov2=e.dinov2 or None)


def reference_of(cfg: RunConfig) -> tuple[str, str | None, int | None]:
    """The reference, the tokenizer that decodes it, and the number of its images that are used (None: all)."""
    e = cfg.eval
    if e.against:
        return e.against, None, None
    return cfg.data.shards, cfg.data.tokenizer, e.against_images or None


def size_of_samples(cfg: RunConfig) -> int:
    """The side in pixels of the run's samples, at which they are scored; shards need not record it."""
    return read_tokenizer_metadata(cfg.data.tokenizer)[0].image_size


def labels_of_run(e: EvaluationConfig, manifest: Manifest, seed: int) -> tuple[list[int], str]:
    """The class of each sample, and how they were chosen: as in the training shards, or in turn."""
    classes, counts = list(range(len(manifest.classes))), manifest.class_counts
    if e.labels == "data" and counts and sum(counts):
        pool = [c for c, n in enumerate(counts) for _ in range(n)]
        return labels_like(pool, e.samples, seed), LABELS["data"]
    return plan_labels("balanced", e.samples, classes, seed), LABELS["balanced"]


def check_evaluation(cfg: RunConfig, data: RunData | None) -> None:
    """Raise ``UserError`` for what would make every evaluation of the run fail: missing files, another picture size; also
    for thresholds without evaluations."""
    e = cfg.eval
    if not e.every:
        if e.thresholds and not read_evaluations(Path(cfg.run)):  # those of an earlier start are still compared
            raise UserError(unused_thresholds(cfg))
        return
    with kept_random_state(torch.device("cpu")):  # a network may be initialised before its weights are read
        network = open_reference_network(e)
    check_count([e.metric], network, Settings(), e.samples, f"eval.samples = {e.samples}")
    if data is None:
        return
    manifest = data.train.manifest
    if e.labels == "data" and not manifest.class_counts:
        logger.warning(
            "%s records no number of images per class: eval.labels data is not possible, samples have balanced classes",
            cfg.data.shards,
        )
    real, tokenizer, limit = reference_of(cfg)
    check_applicable(real, e.against_subset or None, tokenizer)  # files of statistics alone are not opened below
    size, names = size_of_samples(cfg), _arrays_of(real)
    if "mu" in names and network.key.startswith("inception") and not set(names) & set(NPZ_NAMES):
        return  # statistics only
    if "mu" in names and not set(names) & set(NPZ_NAMES):
        raise UserError(
            f"eval.against = {real} contains only Inception's statistics: use eval.metric=fid, or images as the reference"
        )
    images = open_images(
        real, subset=e.against_subset or None, size=size, tokenizer=tokenizer, limit=limit, data=cfg.data
    )
    if images.count < 2:
        raise UserError(f"eval.against = {real} has {images.count} image(s): a score requires at least 2")


def _arrays_of(real: str) -> Sequence[str]:
    return npz_names(Path(real)) if Path(real).suffix == ".npz" else []
