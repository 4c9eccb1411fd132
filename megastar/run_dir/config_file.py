"""``config.yaml`` of a run folder: written at the first start, compared at each later one."""

from __future__ import annotations

import os.path
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megastar.config.env_text import recorded
from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict, diff_configs, flatten, save_config
from megastar.config.model_sizes import SIZES_OF_DATA
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.layout import CONFIG, MANIFEST
from megastar.utils.files import sha256

WHOLE = {"auto", "global_batch"}  # of self_guided.negatives: the same objective
PATHS = ("run", "data.shards", "data.val_shards", "data.tokenizer", "data.cache", "train.init", "train.init_class_map")
# Fields, and sections ending in a dot, that may differ when a run is resumed.
RESUMABLE = (
    "run",  # the folder was moved
    "model.name",
    "attention.",
    "data.shards",  # the same shards in another place: the checkpoint's digests decide
    "data.val_shards",
    "data.tokenizer",  # likewise
    "data.cache",
    "data.patience",
    "eval.",
    "faults.",
    "repa.encoder",  # and its weights: the checkpoint's record of the features decides
    "repa.online",  # likewise: stored or computed
    "repa.pictures",
    "repa.feature_pool",
    "optim.lr",  # the remedy for a loss that is not finite
    "optim.muon.lr",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.trackers",
    "train.profile.",
    "train.val_every",
    "train.save_every",
    "train.keep",
    "train.threads",
    "train.compile",
    "train.deterministic",
    "train.fused_ops",
    "train.upload",
    "train.micro_batch",
    "train.init",  # the same file in another place, see ``check_same_init``; its options are read at the start only
    "parallel.",
)
FIXED = ("train.init_classes",)  # except these: class embeddings are frozen or not


def may_change(name: str) -> bool:
    """Whether the field ``name`` may differ when a run is resumed."""
    return name.startswith(RESUMABLE) and not name.startswith(FIXED)


def claim_run_folder(cfg: RunConfig) -> None:
    """Compare ``cfg`` with the run folder's config.yaml, and write it if it is new or differs. Raises ``UserError``."""
    if compare_run_folder(cfg):  # a full disk needs no second write of the same file
        save_config(cfg, Path(cfg.run) / CONFIG)


def compare_run_folder(cfg: RunConfig) -> list[str]:
    """The fields in which ``cfg`` differs from the run folder's config.yaml, ["all"] where there is none.

    Raises ``UserError`` that names the fields in which a run of another configuration differs.
    """
    path = Path(cfg.run) / CONFIG
    differing = diff_configs(config_from_dict(read_yaml(path, lenient=True), path), cfg) if path.is_file() else ["all"]
    if path.is_file() and (refused := [d for d in differing if not may_change(d)]):
        raise UserError(
            f"{cfg.run} holds a run of another configuration: {'; '.join(refused)}: choose another run=... or restore the fields"
        )
    return differing


def negatives_of_run(cfg: RunConfig) -> str:
    """``self_guided.negatives`` of ``cfg``; auto and its synonym become what the run folder has, so that a run's objective
    does not change on resume. Decided by config.yaml, without one by the newest checkpoint. Raises ``UserError``."""
    path, wanted = Path(cfg.run) / CONFIG, cfg.self_guided.negatives
    newest = checkpoint_dir.latest(checkpoint_dir.folder_of(cfg.run))
    if path.is_file():
        recorded = config_from_dict(read_yaml(path, lenient=True), path).self_guided.negatives
    elif newest is not None:
        recorded = recorded_negatives(checkpoint_dir.read_manifest(newest).get("config"))
    else:
        return wanted
    return recorded if wanted == "auto" or {wanted, recorded} <= WHOLE else wanted


def sizes_of_run(cfg: RunConfig) -> tuple[dict[str, int], str]:
    """The model's sizes that the run folder has recorded, and where; empty without a record. Raises ``UserError``."""
    path = Path(cfg.run) / CONFIG
    newest = checkpoint_dir.latest(checkpoint_dir.folder_of(cfg.run))
    if path.is_file():
        model: Any = asdict(config_from_dict(read_yaml(path, lenient=True), path).model)
    elif newest is not None:
        path, recorded = newest, checkpoint_dir.read_manifest(newest).get("config")
        model = recorded.get("model") if isinstance(recorded, dict) else None
    else:
        return {}, ""
    fields = model if isinstance(model, dict) else {}
    return {name: fields[name] for name in SIZES_OF_DATA if type(fields.get(name)) is int}, str(path)


def recorded_negatives(config: Any) -> str:
    """That of the configuration in a checkpoint; versions without the field compared the images of a micro-batch."""
    guided = config.get("self_guided") if isinstance(config, dict) else None
    return str((guided if isinstance(guided, dict) else {}).get("negatives", "micro_batch"))


def check_same_negatives(negatives: str, recorded: str, checkpoint: Path) -> None:
    """Raise ``UserError`` if they mean another objective than the checkpoint's."""
    if (negatives in WHOLE) != (recorded in WHOLE):
        raise UserError(
            f"self_guided.negatives = {negatives}: {checkpoint} was trained with {recorded}, which cannot change on resume: "
            "restore the field, or choose another run=..."
        )


def changes_since(old: Any, cfg: RunConfig) -> list[str]:
    """Fields of ``cfg`` that differ from the configuration in a checkpoint: ``optim.lr 0.001 -> 0.0005``.

    Fields that an older version did not record count as unchanged, as does another path to the same place.
    """
    before, values = flatten(old if isinstance(old, dict) else {}), flatten(asdict(cfg))
    now = flatten(recorded(asdict(cfg)))
    changed = {n: (before[n], now[n]) for n in now if n in before and before[n] not in (now[n], values[n])}
    return [
        f"{name} {one if one != '' else chr(34) * 2} -> {other if other != '' else chr(34) * 2}"
        for name, (one, other) in changed.items()
        if name not in PATHS or not _same_place(one, other)
    ]


def _same_place(one: Any, other: Any) -> bool:
    both = bool(one) and bool(other) and "://" not in f"{one}{other}"
    return both and os.path.realpath(str(one)) == os.path.realpath(str(other))


def check_same_init(init: str, recorded: Any, recorded_init: str, checkpoint: Path) -> None:
    """Raise ``UserError`` if ``train.init`` names weights other than those that the run started from.

    ``recorded``: their entry in the checkpoint. A file, or a run's checkpoint, in another place is the same if its SHA-256
    is the same.
    """
    if init == recorded_init or _same_place(init, recorded_init):
        return
    digest = recorded.get("sha256") if isinstance(recorded, dict) else None
    name = recorded.get("checkpoint") if isinstance(recorded, dict) else None
    run = [checkpoint_dir.folder_of(init) / name / MANIFEST] if isinstance(name, str) else []
    hub = [Path(init) / name for name in ("model.safetensors", "config.json")]  # in the Hub's layout
    places = [Path(init), *run, Path(init) / MANIFEST, *hub]
    if init and digest and any(os.path.isfile(place) and sha256(place) == digest for place in places):
        return
    raise UserError(
        f"train.init = {init!r}: {checkpoint} started from {recorded_init or 'random weights'!r}, which cannot change on "
        "resume: restore the field, or choose another run=..."
    )
