"""``config.yaml`` of a run folder: written at the first start, compared at each later one."""

from __future__ import annotations

from pathlib import Path

from megastar.config.files import read_yaml
from megastar.config.load import config_from_dict, diff_configs, save_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir.layout import CONFIG

# Fields, and sections ending in a dot, that may differ when a run is resumed.
RESUMABLE = (
    "model.name",
    "attention.",
    "data.shards",  # the same shards in another place: the checkpoint's digests decide
    "data.val_shards",
    "data.cache",
    "data.patience",
    "faults.",
    "optim.lr",  # the remedy for a loss that is not finite
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.val_every",
    "train.save_every",
    "train.keep",
    "train.threads",
    "train.compile",
    "train.deterministic",
    "train.fused_ops",
    "train.upload",
    "train.micro_batch",
    "parallel.",
)


def claim_run_folder(cfg: RunConfig, *, write: bool) -> None:
    """Compare ``cfg`` with the run folder's config.yaml, and ``write`` it where it is new or differs.

    Raises ``UserError`` that names the fields in which a run of another configuration differs.
    """
    path = Path(cfg.run) / CONFIG
    differing = diff_configs(config_from_dict(read_yaml(path, lenient=True), path), cfg) if path.is_file() else ["all"]
    if path.is_file() and (refused := [d for d in differing if not d.startswith(RESUMABLE)]):
        raise UserError(
            f"{cfg.run} holds a run of another configuration: {'; '.join(refused)}: choose another run=... or restore the fields"
        )
    if write and differing:  # a full disk needs no second write of the same file
        save_config(cfg, path)
