"""Every knob of ``megastar compare``. Plain dataclasses, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megastar.config.schema import RunConfig, knob

SPLITS = ("train", "val", "test")
WEIGHTS = ("ema", "student")
KINDS = ("main", "ablation")
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class VariantConfig:
    """One kind of training: in what it differs from ``base``."""

    label: str = knob("", "what tables and figures call it; empty: its name")
    kind: str = knob("main", "main, or ablation: drawn thinner", choices=KINDS)
    overrides: list[str] = knob([], "fields of the base run that differ, each as section.field=value")
    seeds: list[int] = knob([], "seeds of its runs; empty: the comparison's", low=0)


@dataclass
class ProbeConfig:
    """The linear probe of each run's last checkpoint (megastar probe)."""

    fit_on: str = knob("train", "split that the probe is fitted on", choices=SPLITS)
    score_on: str = knob("test", "split that it is scored on: val to tune, test to report", choices=SPLITS)
    fit_crops: int = knob(1, "stored crops of each picture that it is fitted on; 1: the centre one, as MAE", low=1)
    block: int = knob(6, "block, counted from 1", low=1)
    positions: int = knob(8, "positions, evenly spaced, the last one the sequence's end", low=1)
    epochs: int = knob(90, "passes over the features", low=1)
    batch: int = knob(0, "pictures a step; 0: 16384, on small sets 1/78 of them", low=0)
    lr: float = knob(0.0, "peak learning rate; 0: 0.1 * batch / 256", low=0)
    optimizer: str = knob("lars", "lars as MAE; sgd for small sets", choices=("lars", "sgd"))
    seed: int = knob(0, "seed of the probe's weights and order; the same for all runs", low=0)


@dataclass
class SampleConfig:
    """The sampler, the same for all runs (megastar sample)."""

    count: int = knob(2000, "pictures of each run's last checkpoint", low=4)
    like: str = knob("train", "split whose class frequencies the pictures follow", choices=SPLITS)
    cfg_scale: float = knob(1.0, "classifier-free guidance; 1: none", low=1)
    temperature: float = knob(1.0, "1: the model's own distribution", above=0)
    top_k: int = knob(0, "keep the k likeliest codes; 0: all", low=0)
    top_p: float = knob(1.0, "keep the likeliest codes up to this mass", above=0, high=1)
    seed: int = knob(0, "picture i depends on this, i and its class only", low=0)
    batch: int = knob(64, "pictures at once", low=1)


@dataclass
class ScoreConfig:
    """What the pictures are scored with and against (megastar evaluate)."""

    against: list[str] = knob(["test"], "splits whose pictures are the real ones; the first one's score leads")
    metrics: list[str] = knob([], "of fid, sfid, is, pr, kid, fd; the first one leads. Empty: fid,sfid,is,pr, or fd")
    inception: str = knob("", "FID's Inception file; empty: FD-EffLite0, which needs none")
    batch: int = knob(32, "pictures at once", low=1)


@dataclass
class CurveConfig:
    """Scores while training: the figure of score over images seen."""

    every: int = knob(
        0, "steps between the checkpoints that are scored, a multiple of train.save_every; 0: none", low=0
    )
    count: int = knob(1000, "pictures of each; the last checkpoint gets as many again, so that all compare", low=4)
    probe: bool = knob(False, "probe these checkpoints too")


@dataclass
class CompareConfig:
    """Variants of one run, trained with the same seeds on the same data, then probed, sampled and scored alike."""

    out: str = knob("runs/compare", "folder of everything: runs/, logs/, results.json, table.md, probe.png, score.png")
    pictures: str = knob("", "folder or tar with the top folders train, val and test")
    codes: str = knob(
        "", "folder with token shards train/, val/ and test/, made where they are missing; empty: OUT/codes"
    )
    seeds: list[int] = knob(
        [0, 1, 2], "of the weights, the data order and every draw; each gives a run a variant", low=0
    )
    weights: list[str] = knob(
        ["ema", "student"],
        "which are probed and scored: ema is the average (ST-AR's teacher; kept by AR runs alike), student the "
        "trained weights themselves. The first leads",
    )
    jobs: int = knob(1, "runs side by side", low=1)
    nproc: int = knob(1, "processes of one run", low=1)
    variants: dict[str, VariantConfig] = knob({}, "name -> what differs")
    probe: ProbeConfig = knob(ProbeConfig, "the linear probe")
    sample: SampleConfig = knob(SampleConfig, "the sampler")
    score: ScoreConfig = knob(ScoreConfig, "the score")
    curve: CurveConfig = knob(CurveConfig, "scores while training")
    base: RunConfig = knob(RunConfig, "the run that all variants change, or a path to one; megastar train --help")


def rules(cfg: CompareConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Broken rules of the comparison itself: (sentence, fields)."""
    if not cfg.out:
        yield "out is empty: name a folder", ("out",)
    if not cfg.pictures:
        yield "pictures is empty: name a folder or a tar with the top folders train, val and test", ("pictures",)
    if not cfg.variants:
        yield "variants is empty: name at least one", ("variants",)
    if not cfg.seeds:
        yield "seeds is empty: give at least one", ("seeds",)
    for name, values in [("seeds", cfg.seeds), *((f"variants.{n}.seeds", v.seeds) for n, v in cfg.variants.items())]:
        if len(set(values)) != len(values):
            yield f"{name} = {values}: one seed is there twice", (name,)
    for name in cfg.variants:
        if not NAME.fullmatch(name):
            yield f"variants.{name}: a name is made of a-z, 0-9 and _", (f"variants.{name}",)
        if not cfg.variants[name].label.isprintable():
            yield f"variants.{name}.label = {cfg.variants[name].label!r}: must be one line", (f"variants.{name}.label",)
    labels = [v.label or name for name, v in cfg.variants.items()]
    if twice := [x for x in labels if labels.count(x) > 1]:
        yield f"variants: two are called {twice[0]!r}", ("variants",)
    for name, texts, known in (("weights", cfg.weights, WEIGHTS), ("score.against", cfg.score.against, SPLITS)):
        if not texts or len(set(texts)) != len(texts) or set(texts) - set(known):
            yield f"{name} = {texts}: must hold some of {', '.join(known)}, each once", (name,)
    t, every = cfg.base.train, cfg.curve.every
    if not t.steps:
        yield "base.train.steps is 0: a comparison is of a fixed number of steps", ("base.train.steps",)
    if every % t.save_every:
        yield (
            f"curve.every = {every}: must be a multiple of base.train.save_every {t.save_every}",
            ("curve.every", "base.train.save_every"),
        )
    if cfg.probe.positions > cfg.base.model.image_tokens:
        yield (
            f"probe.positions = {cfg.probe.positions}: the model has {cfg.base.model.image_tokens}",
            ("probe.positions", "base.model.image_tokens"),
        )
    if cfg.probe.block > cfg.base.model.n_layer:
        yield (
            f"probe.block = {cfg.probe.block}: the model has {cfg.base.model.n_layer} blocks",
            ("probe.block", "base.model.n_layer"),
        )
