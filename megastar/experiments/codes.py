"""The token shards of a comparison: whether its runs can read those that exist. Codes are never made again, since runs were
trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megastar.config.comparison import CompareConfig
from megastar.data.loader import check_enough, check_manifest
from megastar.data.shards.features import check_same_features, check_usable
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.storage.shard_info import MANIFEST
from megastar.errors import UserError
from megastar.experiments.plan import PlannedRun, codes_folder, encoder_of, is_trained, needed_splits
from megastar.tokenizer.io import tokenizer_hash


def existing_codes(cfg: CompareConfig, split: str) -> Manifest | None:
    """The manifest of the codes of ``split``; None where they are not made yet. Raises ``UserError``."""
    folder = codes_folder(cfg, split)
    return load_manifest(folder) if (Path(folder) / MANIFEST).is_file() else None


def check_stored_features(cfg: CompareConfig, runs: Sequence[PlannedRun]) -> None:
    """Raise ``UserError`` if existing codes lack the features that a run which is left to train reads, or have those of
    another encoder.

    Otherwise each such run would end with this error when it starts.
    """
    reading = [run for run in runs if run.cfg.repa.active and not run.cfg.repa.online]
    aligned = {run.variant: run.cfg.repa for run in reading if not is_trained(run)}
    if not aligned:
        return
    splits = [split for split in needed_splits(cfg) if split != "test"]  # no run trains or validates on test
    made = {split: existing_codes(cfg, split) for split in splits}
    known = {split: m.stored_features for split, m in made.items() if m is not None}
    another = "choose another out=..." + (" and codes=..." if cfg.codes else "")
    encoder, _ = encoder_of(runs)
    for variant, repa in aligned.items():
        # Features of the split val are not needed; where it has some, they are those of train, made now or before.
        if "train" in known:
            split = "train"
        elif known.get("val") is not None:
            split, repa = "val", replace(repa, encoder=encoder)
        else:
            return
        try:
            check_usable(
                repa,
                known[split],
                f"data.shards = {codes_folder(cfg, split)}",
                another,
                f"{another}, or compute the features in training (repa.online)",
            )
        except UserError as error:
            raise UserError(f"variant {variant}: {error}") from None
    if len(known) == 2:
        check_same_features(known["train"], known["val"], *(codes_folder(cfg, split) for split in ("train", "val")))


def features_to_make(cfg: CompareConfig, runs: Sequence[PlannedRun], split: str) -> tuple[str, str]:
    """The encoder of the features that new codes of ``split`` store, and its weights file; ("", "") for none."""
    encoder, weights = encoder_of(runs)
    if split == "test":
        return "", ""
    train = existing_codes(cfg, "train") if split == "val" else None
    if train is not None and (train.stored_features is None or train.stored_features.encoder != encoder):
        return "", ""  # of the encoder of existing codes, which no variant names, the weights are unknown
    return encoder, weights


def check_codes(cfg: CompareConfig, runs: Sequence[PlannedRun]) -> None:
    """Raise ``UserError`` for training codes that a run which is left to train cannot read: of another tokenizer, with too few
    crops, of other sizes than its network's."""
    folder = codes_folder(cfg, "train")
    manifest, tokenizer = load_manifest(folder), cfg.base.data.tokenizer
    digest = tokenizer_hash(tokenizer) if Path(tokenizer).is_file() else None
    for run in {run.variant: run for run in runs if not is_trained(run)}.values():
        try:
            check_manifest(manifest, run.cfg.model, digest, run.cfg.views)
            check_enough(folder, manifest, run.cfg.train.global_batch)
        except UserError as error:
            raise UserError(f"variant {run.variant}, data.shards = {folder}: {error}") from None
