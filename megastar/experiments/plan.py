"""The runs of a comparison; runs of one seed see the same images in the same order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megastar.config.comparison import CompareConfig
from megastar.config.load import diff_configs, load_compare_config, load_config, override_config
from megastar.config.model_sizes import set_sizes, take_sizes
from megastar.config.rules.evaluation import unused_thresholds
from megastar.config.schema import RunConfig
from megastar.config.validate import find_problems
from megastar.errors import UserError
from megastar.experiments.samplers import check_samplers, sampler_of, training_overrides
from megastar.run_dir.checkpoint_dir import folder_of, latest, name_of
from megastar.run_dir.layout import CONFIG

# Fields that do not affect the result: a run may differ in them from its folder, or from another run of its seed. Of
# ``eval``, which is equal for all variants, scores of other settings are left out of the table.
HOUSEKEEPING = (
    "run",
    "data.shards",
    "data.val_shards",
    "data.cache",
    "data.cache_gib",
    "data.patience",
    "eval",
    "faults.hang_timeout",
    "faults.lost_timeout",
    "faults.join_timeout",
    "faults.checksum_every",
    "faults.memory_every",
    "faults.memory_copies",
    "faults.slow_ratio",
    "faults.save_patience",
    "train.log_every",
    "train.keep_last",
    "train.keep_every",
    "train.threads",
    "train.upload",
)
MAX_HASHED = 4_000_000  # samples; of a longer run, this many at both ends are hashed


@dataclass(frozen=True)
class PlannedRun:
    """A variant with one seed."""

    name: str
    variant: str
    seed: int
    cfg: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run)

    @property
    def steps(self) -> int:
        return self.cfg.train.steps

    @property
    def images(self) -> int:
        """Images that the run sees, counting repetitions but not crops."""
        return self.steps * self.cfg.train.global_batch

    @property
    def sequences(self) -> int:
        """Sequences that the student processes."""
        return self.images * self.cfg.student_views


def codes_folder(cfg: CompareConfig, split: str) -> str:
    """The folder of the token shards of a split."""
    return str(Path(cfg.codes or Path(cfg.out) / "codes") / split)


def needed_splits(cfg: CompareConfig) -> list[str]:
    """The splits whose codes are needed."""
    needed = {"train", cfg.probe.fit_on, cfg.probe.score_on, cfg.sample.like}
    return [s for s in ("train", "val", "test") if s in needed | ({"val"} if cfg.base.train.val_every else set())]


def plan_runs(cfg: CompareConfig, gpus: int) -> list[PlannedRun]:
    """All runs, seed by seed, so that one run of each variant finishes first. Raises ``UserError``."""
    if gpus and cfg.nproc > gpus:
        raise UserError(f"nproc = {cfg.nproc}: there are {gpus} GPUs and each process of a run needs one; reduce nproc")
    seeds_of = {name: v.seeds or cfg.seeds for name, v in cfg.variants.items()}
    seeds = list(dict.fromkeys([*cfg.seeds, *(s for own in seeds_of.values() for s in own)]))
    concurrent = min(cfg.jobs, sum(map(len, seeds_of.values())))
    threads = 0 if gpus else max(1, len(os.sched_getaffinity(0)) // (concurrent * cfg.nproc))
    runs = []
    for seed in seeds:
        for name, variant in cfg.variants.items():
            if seed not in seeds_of[name]:
                continue
            label = f"{name}-seed{seed}"
            fixed = {
                "run": Path(cfg.out) / "runs" / label,
                "data.shards": codes_folder(cfg, "train"),
                "data.val_shards": codes_folder(cfg, "val") if cfg.base.train.val_every else "",
                "train.seed": seed,
                "train.keep_every": cfg.curve.every,
                "train.threads": cfg.base.train.threads or threads,
            }
            own = training_overrides(variant)
            if conflicts := [text for text in own if text.partition("=")[0] in fixed]:
                raise UserError(
                    f"variants.{name}.overrides contains {conflicts[0]}, which the comparison sets itself: remove it"
                )
            if scored := [text for text in own if text.startswith(("eval.", "eval="))]:
                raise UserError(
                    f"variants.{name}.overrides contains {scored[0]}: scores while training are compared if all variants are "
                    "scored alike; set base.eval"
                )
            overrides = [*own, *(f"{field}={value}" for field, value in fixed.items())]
            runs.append(PlannedRun(label, name, seed, override_config(cfg.base, overrides, f"variant {name}")))
    check_fair(runs, cfg.curve.every)
    encoder_of(runs)
    check_samplers(cfg, ((run.variant, run.cfg.model) for run in runs))
    return runs


def check_thresholds(cfg: CompareConfig) -> None:
    """Raise ``UserError`` for thresholds of a comparison whose runs are not scored while they train."""
    if cfg.base.eval.thresholds and not cfg.base.eval.every:
        raise UserError(unused_thresholds(cfg.base, "base."))


def encoder_of(runs: Iterable[PlannedRun]) -> tuple[str, str]:
    """The encoder of the variants with representation alignment, whose features the codes store, and its weights file.

    ("", "") if no variant has it. Raises ``UserError`` for variants with different encoders.
    """
    first: PlannedRun | None = None
    for run in runs:
        if not run.cfg.repa.active or run.cfg.repa.online:
            continue
        first = first or run
        own, other = ((r.cfg.repa.encoder, r.cfg.repa.encoder_weights) for r in (run, first))
        if own != other:
            raise UserError(
                f"variants {first.variant} and {run.variant}: repa.encoder and encoder_weights {other} and {own} differ, and all "
                "variants read the same codes: use one encoder"
            )
    return (first.cfg.repa.encoder or "efflite0", first.cfg.repa.encoder_weights) if first else ("", "")


def take_sizes_of_codes(cfg: CompareConfig, runs: Iterable[PlannedRun]) -> str:
    """Set the unset sizes of all models from the manifest of the training codes, if that exists; a sentence about them.

    Raises ``UserError`` for sizes that do not fit the rest of the configuration.
    """
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.storage.shard_info import MANIFEST

    folder = codes_folder(cfg, "train")
    if not cfg.base.model.unset or not (Path(folder) / MANIFEST).is_file():
        return ""
    sizes, origin = load_manifest(folder).model_sizes, f"the manifest of {folder}"
    runs = list(runs)
    for run in runs:
        take_sizes(run.cfg, sizes, origin)
    words = set_sizes(cfg.base, sizes)
    if problem := next(iter(find_problems(cfg)), None):
        raise UserError(f"{words}, from {origin}: {problem.text}")
    check_samplers(cfg, ((run.variant, run.cfg.model) for run in runs))
    return f"{words}, from {origin}"


def changed_fields(cfg: CompareConfig, run: PlannedRun) -> list[str]:
    """The fields in which a run and its sampler differ from the base configuration, except the housekeeping ones."""
    sampled = [f"sample.{text}" for text in diff_configs(cfg.sample, sampler_of(cfg, run.variant))]
    return [*diff_configs(cfg.base, run.cfg, (*HOUSEKEEPING, "train.seed")), *sampled]


def baselines(cfg: CompareConfig, runs: Iterable[PlannedRun]) -> list[str]:
    """The variants that others are compared with: the main ones without self-guidance and alignment, of them those of raster
    order if there are any; else the first main one."""
    runs = list(runs)
    guided = {run.variant: run.cfg.self_guided.enabled or run.cfg.repa.active for run in runs}
    raster = {run.variant: run.cfg.token_order.kind == "raster" for run in runs}
    main = [name for name, v in cfg.variants.items() if v.kind == "main"]
    plain = [name for name in main if not guided[name]]
    return [name for name in plain if raster[name]] or plain or main[:1]


def check_fair(runs: Iterable[PlannedRun], every: int) -> None:
    """Raise ``UserError`` if overrides of a variant change the number of images, or which checkpoints are kept."""
    first: PlannedRun | None = None
    for run in runs:
        first = first or run
        for what in ("images", "steps"):
            own, other = getattr(run, what), getattr(first, what)
            if own != other:
                raise UserError(
                    f"variant {run.variant} trains on {own} {what}, {first.variant} on {other}: use equal train.steps and "
                    "train.global_batch in all variants"
                )
        if every % run.cfg.train.save_every:
            raise UserError(
                f"variant {run.variant}: train.save_every = {run.cfg.train.save_every} must divide curve.every {every}"
            )


def check_folder(cfg: CompareConfig, runs: Iterable[PlannedRun]) -> None:
    """Raise ``UserError`` if the folder contains runs or codes of another configuration than ``runs``.

    Evaluation settings may change, and seeds and variants may be added.
    """
    advice = "choose another out=..., or restore the fields"
    saved = Path(cfg.out) / "compare.yaml"
    if saved.is_file():
        changes = diff_configs(load_compare_config(saved), cfg)
        fields = [d for d in changes if d.startswith(("pictures:", "codes:", "base.data.tokenizer:"))]
        if fields:
            raise UserError(f"{cfg.out} contains a comparison with other data ({'; '.join(fields)}): {advice}")
    for run in runs:
        saved = run.folder / CONFIG
        if not saved.is_file():
            continue
        fields = diff_configs(load_config(saved), run.cfg, HOUSEKEEPING)
        # A run that began before the field existed keeps its reading.
        if fields := [d for d in fields if d != "self_guided.negatives: micro_batch -> auto"]:
            raise UserError(f"{run.folder} contains a run with another configuration ({'; '.join(fields)}): {advice}")


def is_trained(run: PlannedRun) -> bool:
    """Whether its last checkpoint exists; ``check_folder`` verifies its configuration."""
    newest = latest(folder_of(run.cfg.run))
    return newest is not None and newest.name == name_of(run.steps)


def order_digest(run: PlannedRun) -> str:
    """SHA-256 of the order of images, the first crop of each and the dropped labels, as the loader draws them.

    A function of the shards, the seed, the batch and the length; equal for all runs of one seed.
    """
    import numpy as np

    from megastar.data.order import OrderSpec, sample_ids
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.shards.shard_table import update_digest
    from megastar.data.views import draw_label_drop, draw_views

    cfg = run.cfg
    manifest = load_manifest(cfg.data.shards, cfg.data)
    spec, seed = OrderSpec(cfg.train.seed, manifest.shard_sizes, cfg.data.window), cfg.train.seed
    digest = hashlib.sha256()
    update_digest(digest, manifest.shards)
    total, part = run.images, 65536
    starts = [s for s in range(0, total, part) if s < MAX_HASHED or s >= total - MAX_HASHED]
    for start in starts:
        ids, epochs = sample_ids(spec, start, min(part, total - start))
        views = draw_views(seed, epochs, ids, manifest.views, cfg.views)[:, 0]
        dropped = draw_label_drop(seed, epochs, ids, cfg.model.class_dropout_prob)
        for column in (ids, epochs, views, dropped):
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def check_order(runs: Iterable[PlannedRun]) -> dict[str, str]:
    """Name -> ``order_digest``. Raises ``UserError`` if two runs of one seed differ."""
    digests: dict[str, str] = {}
    firsts: dict[int, PlannedRun] = {}
    computed: dict[tuple[object, ...], str] = {}  # equal inputs have equal digests
    for run in runs:
        c = run.cfg
        key = (c.train.seed, c.data.shards, c.data.window, run.images, min(c.views, 3), c.model.class_dropout_prob)
        if key not in computed:
            computed[key] = order_digest(run)
        digests[run.name] = computed[key]
        first = firsts.setdefault(run.seed, run)
        if digests[first.name] != digests[run.name]:
            raise UserError(
                f"{run.name} would train on other images than {first.name}, or in another order: use equal data.window and "
                "model.class_dropout_prob in all variants"
            )
    return digests
