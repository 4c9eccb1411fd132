"""Which runs a comparison is made of, and that runs of one seed see the same pictures in the same order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megastar.config.comparison import CompareConfig
from megastar.config.load import diff_configs, load_compare_config, load_config, override_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir.checkpoint_dir import folder_of, latest, name_of

# Fields in which a run may differ from what its folder holds, or from another of the same seed, and say the same.
HOUSEKEEPING = (
    "run",
    "data.shards",
    "data.val_shards",
    "data.cache",
    "data.cache_gib",
    "data.patience",
    "faults",
    "train.log_every",
    "train.keep_last",
    "train.keep_every",
    "train.threads",
    "train.upload",
)
MOST = 4_000_000  # samples whose order is hashed in full; of a longer run the first and the last that many


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed."""

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
        """Pictures that the run sees, repetitions counted, crops not."""
        return self.steps * self.cfg.train.global_batch

    @property
    def sequences(self) -> int:
        """Sequences that go through the student."""
        return self.images * self.cfg.student_views


def codes_of(cfg: CompareConfig, split: str) -> str:
    """The folder of a split's token shards."""
    return str(Path(cfg.codes or Path(cfg.out) / "codes") / split)


def splits_of(cfg: CompareConfig) -> list[str]:
    """The splits whose codes are needed."""
    wanted = {"train", cfg.probe.fit_on, cfg.probe.score_on, cfg.sample.like}
    return [s for s in ("train", "val", "test") if s in wanted | ({"val"} if cfg.base.train.val_every else set())]


def plan_runs(cfg: CompareConfig, gpus: int) -> list[PlannedRun]:
    """All runs, seed by seed, so that one of each is done first. Raises ``UserError``."""
    if gpus and cfg.nproc > gpus:
        raise UserError(f"nproc = {cfg.nproc}: there are {gpus} GPUs, and each process of a run needs its own")
    chosen = {name: v.seeds or cfg.seeds for name, v in cfg.variants.items()}
    seeds = list(dict.fromkeys([*cfg.seeds, *(s for some in chosen.values() for s in some)]))
    side_by_side = min(cfg.jobs, sum(map(len, chosen.values())))
    threads = 0 if gpus else max(1, len(os.sched_getaffinity(0)) // (side_by_side * cfg.nproc))
    runs = []
    for seed in seeds:
        for name, variant in cfg.variants.items():
            if seed not in chosen[name]:
                continue
            label = f"{name}-seed{seed}"
            given = {
                "run": Path(cfg.out) / "runs" / label,
                "data.shards": codes_of(cfg, "train"),
                "data.val_shards": codes_of(cfg, "val") if cfg.base.train.val_every else "",
                "train.seed": seed,
                "train.keep_every": cfg.curve.every,
                "train.threads": cfg.base.train.threads or threads,
            }
            if taken := [text for text in variant.overrides if text.partition("=")[0] in given]:
                raise UserError(
                    f"variants.{name}.overrides holds {taken[0]}, which the comparison sets: remove it there"
                )
            overrides = [*variant.overrides, *(f"{field}={value}" for field, value in given.items())]
            runs.append(PlannedRun(label, name, seed, override_config(cfg.base, overrides, f"variant {name}")))
    check_fair(runs, cfg.curve.every)
    return runs


def difference(cfg: CompareConfig, run: PlannedRun) -> list[str]:
    """In what a run's configuration differs from the base one, housekeeping aside."""
    return diff_configs(cfg.base, run.cfg, (*HOUSEKEEPING, "train.seed"))


def baselines(cfg: CompareConfig, runs: Iterable[PlannedRun]) -> list[str]:
    """What the others are compared with: the main variants without self-guidance, else the first main one."""
    guided = {run.variant: run.cfg.self_guided.enabled for run in runs}
    main = [name for name, v in cfg.variants.items() if v.kind == "main"]
    return [name for name in main if not guided[name]] or main[:1]


def check_fair(runs: Iterable[PlannedRun], every: int) -> None:
    """Raise ``UserError`` where a variant's overrides change how many pictures its runs see, or which checkpoints stay."""
    first: PlannedRun | None = None
    for run in runs:
        first = first or run
        for what in ("images", "steps"):
            here, there = getattr(run, what), getattr(first, what)
            if here != there:
                raise UserError(
                    f"variant {run.variant} trains on {here} {what}, {first.variant} on {there}: a comparison is of equal "
                    "train.steps and train.global_batch"
                )
        if every % run.cfg.train.save_every:
            raise UserError(
                f"variant {run.variant} saves every {run.cfg.train.save_every} steps: curve.every {every} must be a "
                "multiple of it"
            )


def check_folder(cfg: CompareConfig, runs: Iterable[PlannedRun]) -> None:
    """Raise ``UserError`` when the folder holds runs or codes of another configuration than ``runs``.

    What is measured of them may change, and seeds and variants may be added.
    """
    advice = "choose another out=..., or restore the fields"
    before = Path(cfg.out) / "compare.yaml"
    if before.is_file():
        there = load_compare_config(before)
        fields = [d for d in diff_configs(there, cfg) if d.startswith(("pictures:", "codes:", "base.data.tokenizer:"))]
        if fields:
            raise UserError(f"{cfg.out} holds a comparison on other data ({'; '.join(fields)}): {advice}")
    for run in runs:
        there_too = run.folder / "config.yaml"
        if there_too.is_file() and (fields := diff_configs(load_config(there_too), run.cfg, HOUSEKEEPING)):
            raise UserError(f"{run.folder} holds a run of another configuration ({'; '.join(fields)}): {advice}")


def is_trained(run: PlannedRun) -> bool:
    """Whether its last checkpoint is there; ``check_folder`` has found it to be of this configuration."""
    newest = latest(folder_of(run.cfg))
    return newest is not None and newest.name == name_of(run.steps)


def order_digest(run: PlannedRun) -> str:
    """SHA-256 over which pictures come when, the first crop of each and whose label is dropped, as the loader draws them.

    A function of the shards, the seed, the batch and the length; runs of one seed must have one digest.
    """
    import numpy as np

    from megastar.data.order import OrderSpec, sample_ids
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.views import draw_label_drop, draw_views

    cfg = run.cfg
    manifest = load_manifest(cfg.data.shards, cfg.data)
    spec, seed = OrderSpec(cfg.train.seed, manifest.shard_sizes, cfg.data.window), cfg.train.seed
    digest = hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode())
    total, part = run.images, 65536
    starts = [s for s in range(0, total, part) if s < MOST or s >= total - MOST]
    for start in starts:
        ids, epochs = sample_ids(spec, start, min(part, total - start))
        views = draw_views(seed, epochs, ids, manifest.views, cfg.views)[:, 0]
        dropped = draw_label_drop(seed, epochs, ids, cfg.model.class_dropout_prob)
        for column in (ids, epochs, views, dropped):
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def check_order(runs: Iterable[PlannedRun]) -> dict[str, str]:
    """Name -> ``order_digest``. Raises ``UserError`` when two runs of one seed differ."""
    digests: dict[str, str] = {}
    firsts: dict[int, PlannedRun] = {}
    known: dict[tuple[object, ...], str] = {}  # equal inputs, equal digest: computed once
    for run in runs:
        c = run.cfg
        key = (c.train.seed, c.data.shards, c.data.window, run.images, min(c.views, 3), c.model.class_dropout_prob)
        if key not in known:
            known[key] = order_digest(run)
        digests[run.name] = known[key]
        first = firsts.setdefault(run.seed, run)
        if digests[first.name] != digests[run.name]:
            raise UserError(
                f"{run.name} would see other pictures than {first.name}, or in another order: let variants differ in the "
                "method, not in data.window, train.seed or model.class_dropout_prob"
            )
    return digests
