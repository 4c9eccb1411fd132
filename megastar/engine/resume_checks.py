"""Compares a checkpoint with the configuration that resumes it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from megastar.checkpoint.hub.download import is_hub_source
from megastar.config.schema import RunConfig
from megastar.data.shards.manifest import Manifest
from megastar.engine.checkpointer.load import check_resumable
from megastar.engine.checkpointer.s3_upload import check_upload
from megastar.engine.context import Context
from megastar.engine.input_pipeline.data_checks import RunData, check_same_data, check_same_order
from megastar.engine.metrics.trackers.packages import check_installed
from megastar.engine.profiling.settings import check_ranks
from megastar.engine.rank_sync import run_on_main
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir, config_file
from megastar.run_dir.training_checks import uses_contrastive
from megastar.utils.launcher import place_of
from megastar.utils.process_exit import AGENT

logger = logging.getLogger(__name__)


def first_checks(cfg: RunConfig) -> RunConfig:
    """``cfg``. Raises ``UserError``, before the data is opened, if ``train.init`` is read and does not exist, for an S3
    endpoint that ``train.upload`` cannot use, a tracker that is not installed, or a profiled rank that does not exist."""
    check_installed(cfg.train.trackers, "train.trackers")
    check_ranks(cfg.train.profile, place_of(os.environ).world, cfg.run, elastic=AGENT in os.environ)
    check_upload(cfg.train.upload)
    init = cfg.train.init
    if (
        init
        and not is_hub_source(init)
        and not Path(init).exists()
        and not checkpoint_dir.latest(checkpoint_dir.folder_of(cfg.run))
    ):
        raise UserError(f"train.init = {init} does not exist: name the weights or the run to start from")
    return cfg


def claim_run_folder(cfg: RunConfig, ctx: Context, data: RunData) -> None:
    """``config_file.claim_run_folder`` on the main rank, with the negatives that the run has always had. A collective."""
    for sentence in data.told if ctx.main else ():
        logger.info("%s", sentence)
    wanted = cfg.self_guided.negatives
    cfg.self_guided.negatives = run_on_main(ctx, lambda: config_file.negatives_of_run(cfg))
    if (
        ctx.main
        and (wanted, cfg.self_guided.negatives) == ("auto", "micro_batch")
        and uses_contrastive(cfg.self_guided)
    ):
        logger.info(
            "%s keeps self_guided.negatives=micro_batch, with which it began: the contrastive losses compare the images of "
            "one forward pass of all data ranks", cfg.run,
        )  # fmt: skip
    run_on_main(ctx, lambda: config_file.claim_run_folder(cfg))


def check_start(cfg: RunConfig, ctx: Context, engines: Engines, data: RunData | None, found: Path | None) -> None:
    """For a dry run, what a start would refuse: a run folder of another configuration, a checkpoint that does not fit.

    ``found``: the checkpoint that a start would resume. Writes nothing. A collective.
    """
    cfg.self_guided.negatives = run_on_main(ctx, lambda: config_file.negatives_of_run(cfg))
    run_on_main(ctx, lambda: config_file.compare_run_folder(cfg))
    if found is not None:
        restored = check_resumable(ctx, engines, found)
        if data is not None:
            check_resumed(cfg, ctx, data, restored, found)


def check_resumed(cfg: RunConfig, ctx: Context, data: RunData, restored: dict[str, Any], found: Path) -> list[str]:
    """The fields that changed since the checkpoint ``found``, whose manifest is ``restored``: logged, one per line.

    Raises ``UserError`` for other data, another order of it, or other initial weights. A collective.
    """
    check_same_data(cfg.data, restored, data.record, found)
    check_same_order(cfg.data.window, data.train.manifest, restored, found)
    recorded = restored.get("config")
    before = recorded if isinstance(recorded, dict) else {}
    init = str((before.get("train") or {}).get("init") or "")
    run_on_main(ctx, lambda: config_file.check_same_init(cfg.train.init, restored.get("init"), init, found))
    _check_same_target(cfg, before, found)
    if uses_contrastive(cfg.self_guided):
        config_file.check_same_negatives(cfg.self_guided.negatives, config_file.recorded_negatives(before), found)
    changes = config_file.changes_since(before, cfg)
    if ctx.main:
        for change in changes:
            logger.info("changed since %s: %s", found.name, change)
    return changes


def _check_same_target(cfg: RunConfig, before: dict[str, Any], found: Path) -> None:
    """Both kinds of random order have the same weights."""
    recorded = (before.get("model") or {}).get("target_position", "none")
    if before and recorded != cfg.model.target_position:
        raise UserError(
            f"model.target_position = {cfg.model.target_position}: {found} was trained with {recorded}, which cannot change on "
            "resume: restore the field, or choose another run=..."
        )


def start_event(
    cfg: RunConfig, ctx: Context, manifest: Manifest, found: Path | None, step: int, steps: int
) -> list[str]:
    """Kind and text of the event that records a start."""
    if ctx.main and not manifest.tokenizer_sha256:
        logger.warning("%s records no tokenizer hash; assuming it matches data.tokenizer", cfg.data.shards)
    if found:
        return ["resumed", f"resumed {found} at step {step}"]
    return ["started", f"{cfg.run}: {steps} steps on {ctx.world} rank(s)"]
