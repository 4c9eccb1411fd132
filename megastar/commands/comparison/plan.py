"""Which runs a comparison is made of, and that runs of one seed see the same pictures in the same order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megastar.config.comparison import CompareConfig
from megastar.config.load import diff_configs, override_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError

MOST = 4_000_000  # samples whose order is hashed in full; of a longer run the first and the last that many


@dataclass(frozen=True)
class Run:
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


def plan_runs(cfg: CompareConfig, gpus: int) -> list[Run]:
    """All runs, seed by seed, so that one of each is done first. Raises ``UserError``."""
    chosen = {name: v.seeds or cfg.seeds for name, v in cfg.variants.items()}
    seeds = list(dict.fromkeys([*cfg.seeds, *(s for some in chosen.values() for s in some)]))
    threads = 0 if gpus else max(1, len(os.sched_getaffinity(0)) // (cfg.jobs * cfg.nproc))
    runs = []
    for seed in seeds:
        for name, variant in cfg.variants.items():
            if seed not in chosen[name]:
                continue
            label = f"{name}-seed{seed}"
            given = [
                f"run={Path(cfg.out) / 'runs' / label}",
                f"data.shards={codes_of(cfg, 'train')}",
                f"data.val_shards={codes_of(cfg, 'val') if cfg.base.train.val_every else ''}",
                f"train.seed={seed}",
                f"train.keep_every={cfg.curve.every}",
                f"train.threads={cfg.base.train.threads or threads}",
            ]
            run = override_config(cfg.base, [*variant.overrides, *given], f"variant {name}")
            runs.append(Run(label, name, seed, run))
    check_fair(runs)
    return runs


def difference(cfg: CompareConfig, run: Run) -> list[str]:
    """In what a run's configuration differs from the base one, housekeeping aside."""
    ignored = ("run", "data", "train.seed", "train.keep_every", "train.threads")
    return diff_configs(cfg.base, run.cfg, ignored)


def check_fair(runs: Iterable[Run]) -> None:
    """Raise ``UserError`` where a variant's overrides change how many pictures its runs see."""
    first: Run | None = None
    for run in runs:
        first = first or run
        for what in ("images", "steps"):
            here, there = getattr(run, what), getattr(first, what)
            if here != there:
                raise UserError(
                    f"variant {run.variant} trains on {here} {what}, {first.variant} on {there}: a comparison is of equal "
                    "train.steps and train.global_batch"
                )


def order_digest(run: Run) -> str:
    """SHA-256 over which pictures come when, the first crop of each and whose label is dropped, as the loader draws them.

    A function of the shards, the seed, the batch and the length; runs of one seed must have one digest.
    """
    import numpy as np

    from megastar.data.manifest import load_manifest
    from megastar.data.order import OrderSpec, sample_ids
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


def check_order(runs: Iterable[Run]) -> dict[str, str]:
    """Name -> ``order_digest``. Raises ``UserError`` when two runs of one seed differ."""
    digests: dict[str, str] = {}
    firsts: dict[int, Run] = {}
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
