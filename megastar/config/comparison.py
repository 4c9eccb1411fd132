"""Every field of ``megastar compare``. Plain dataclasses, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_BATCH, MOST_SEED, MOST_STEPS, knob
from megastar.config.schema import RunConfig

SPLITS = ("train", "val", "test")
WEIGHTS = ("ema", "student")
KINDS = ("main", "ablation")
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class VariantConfig:
    """One kind of training: what differs from ``base``."""

    label: str = knob("", "name in tables and figures; empty: its key")
    kind: str = knob("main", "main, or ablation (thinner lines in figures)", choices=KINDS)
    overrides: list[str] = knob(
        [],
        "fields that differ from the base run, each as section.field=value; also sample.parallel_steps, schedule, token_order",
    )
    seeds: list[int] = knob([], "seeds of its runs; empty: those of the comparison", low=0, high=MOST_SEED)


@dataclass
class ProbeConfig:
    """The linear probe of the last checkpoint of each run (megastar probe)."""

    fit_on: str = knob("train", "split to fit the probe on", choices=SPLITS)
    score_on: str = knob("test", "split to evaluate it on: val to tune, test to report", choices=SPLITS)
    fit_crops: int = knob(1, "stored crops per image to fit on; 1: the centre crop, as in MAE", low=1, high=1024)
    block: int = knob(6, "transformer block whose output is used, counted from 1", low=1, high=1024)
    positions: int = knob(8, "evenly spaced positions; the last one is the end of the sequence", low=1, high=65536)
    epochs: int = knob(90, "passes over the features", low=1, high=10**6)
    batch: int = knob(0, "images per step; 0: 16384, or 1/78 of a small set", low=0, high=MOST_BATCH)
    lr: float = knob(0.0, "peak learning rate; 0: 0.1 * batch / 256", low=0, high=LARGE)
    optimizer: str = knob("lars", "lars, as in MAE; sgd for small sets", choices=("lars", "sgd"))
    seed: int = knob(0, "seed of the weights and the data order; the same for all runs", low=0, high=MOST_SEED)


@dataclass
class SampleConfig:
    """The sampler, the same for all runs but for overrides of parallel decoding in variants (megastar sample)."""

    count: int = knob(2000, "images sampled from the last checkpoint of each run", low=4, high=10**9)
    like: str = knob("train", "split whose class frequencies the samples follow", choices=SPLITS)
    cfg_scale: float = knob(1.0, "classifier-free guidance; 1: none", low=1, high=10**6)
    temperature: float = knob(1.0, "1: the model's own distribution", above=0, high=10**6)
    top_k: int = knob(0, "keep the k most likely codes; 0: all", low=0, high=2**20)
    top_p: float = knob(1.0, "keep the most likely codes up to this probability mass", above=0, high=1)
    parallel_steps: int = knob(
        0, "variants of random token order: draw an image's tokens in this many steps; 0: one by one", low=0, high=65536
    )
    schedule: str = knob(
        "cosine",
        "with parallel_steps: cosine, few tokens in the first steps and many in the last; uniform, as many in each; "
        "without: diagonal, one diagonal of the grid of tokens per step",
        choices=("cosine", "uniform", "diagonal"),
    )
    token_order: str = knob(
        "auto",
        "variants of random token order: raster, random, or auto: random with parallel_steps, else raster",
        choices=("auto", "raster", "random"),
    )
    seed: int = knob(0, "image i depends only on the seed, i and its class", low=0, high=MOST_SEED)
    batch: int = knob(64, "images per batch", low=1, high=MOST_BATCH)


@dataclass
class ScoreConfig:
    """The metrics of the samples, and the real images to compare with (megastar evaluate)."""

    against: list[str] = knob(["test"], "splits of real images to compare with; the first one is the main score")
    metrics: list[str] = knob(
        [], "of fid, sfid, is, pr, kid, fd; the first one is the main score. Empty: fid,sfid,is,pr, or fd"
    )
    inception: str = knob("", "Inception weights file for FID; empty: FD-EffLite0, which needs no file")
    batch: int = knob(32, "images per batch", low=1, high=MOST_BATCH)


@dataclass
class CurveConfig:
    """Scores during training: the figure of score against images seen."""

    every: int = knob(
        0, "steps between scored checkpoints, a multiple of train.save_every; 0: none", low=0, high=MOST_STEPS
    )
    count: int = knob(
        1000, "images per checkpoint; the last one is scored with as many too, for comparison", low=4, high=10**9
    )
    probe: bool = knob(False, "also probe these checkpoints")


@dataclass
class CompareConfig:
    """Variants of one run, trained with the same seeds on the same data, then probed, sampled and scored in the same way."""

    out: str = knob("runs/compare", "output folder: runs/, logs/, results.json, table.md, probe.png, score.png")
    pictures: str = knob("", "folder or tar of images with the top-level folders train, val and test")
    codes: str = knob("", "folder with token shards train/, val/ and test/; missing ones are made; empty: OUT/codes")
    seeds: list[int] = knob(
        [0, 1, 2],
        "seeds of weights, data order and all random numbers; one run per variant and seed",
        low=0,
        high=MOST_SEED,
    )
    weights: list[str] = knob(
        ["ema", "student"],
        "weights to probe and score: ema (ST-AR's teacher; AR runs keep it too), student (the trained weights). The "
        "first one is the main one",
    )
    jobs: int = knob(1, "runs at a time", low=1, high=1024)
    nproc: int = knob(1, "processes per run", low=1, high=1024)
    variants: dict[str, VariantConfig] = knob({}, "key -> what differs")
    probe: ProbeConfig = knob(ProbeConfig, "the linear probe")
    sample: SampleConfig = knob(SampleConfig, "the sampler")
    score: ScoreConfig = knob(ScoreConfig, "the score")
    curve: CurveConfig = knob(CurveConfig, "scores during training")
    base: RunConfig = knob(
        RunConfig, "the run that the variants change, or a path to it; fields: megastar train --help"
    )


def rules(cfg: CompareConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Violated rules of the comparison itself: (sentence, fields)."""
    if not cfg.out:
        yield "out is empty: name a folder", ("out",)
    if not cfg.pictures:
        yield "pictures is empty: name a folder or a tar with the top-level folders train, val and test", ("pictures",)
    if not cfg.variants:
        yield "variants is empty: name at least one", ("variants",)
    if not cfg.seeds:
        yield "seeds is empty: give at least one", ("seeds",)
    for name, values in [("seeds", cfg.seeds), *((f"variants.{n}.seeds", v.seeds) for n, v in cfg.variants.items())]:
        if len(set(values)) != len(values):
            yield f"{name} = {values}: a seed occurs twice; list each seed once", (name,)
    for name in cfg.variants:
        if not NAME.fullmatch(name):
            yield f"variants.{name}: use only a-z, 0-9 and _ in a name", (f"variants.{name}",)
        if not cfg.variants[name].label.isprintable():
            yield f"variants.{name}.label = {cfg.variants[name].label!r}: must be one line", (f"variants.{name}.label",)
    labels = [v.label or name for name, v in cfg.variants.items()]
    if twice := [x for x in labels if labels.count(x) > 1]:
        yield f"variants: two variants have the label {twice[0]!r}; give each its own", ("variants",)
    for name, texts, known in (("weights", cfg.weights, WEIGHTS), ("score.against", cfg.score.against, SPLITS)):
        if not texts or len(set(texts)) != len(texts) or set(texts) - set(known):
            yield f"{name} = {texts}: must contain one or more of {', '.join(known)}, each once", (name,)
    if cfg.sample.schedule == "uniform" and not cfg.sample.parallel_steps:
        yield (
            f"sample.schedule = {cfg.sample.schedule}: divides the tokens among sample.parallel_steps, which is 0: set that too",
            ("sample.schedule", "sample.parallel_steps"),
        )
    t, every = cfg.base.train, cfg.curve.every
    if not t.steps:
        yield "base.train.steps is 0: give the number of steps, the same for all variants", ("base.train.steps",)
    if every % t.save_every:
        yield (
            f"curve.every = {every}: must be a multiple of base.train.save_every {t.save_every}",
            ("curve.every", "base.train.save_every"),
        )
    if cfg.probe.fit_on == cfg.probe.score_on:
        yield (
            f"probe.fit_on and probe.score_on are both {cfg.probe.fit_on}: a probe is scored on other images than it is fitted on",
            ("probe.fit_on", "probe.score_on"),
        )
    if cfg.probe.positions > cfg.base.model.image_tokens:
        yield (
            f"probe.positions = {cfg.probe.positions}: must be at most base.model.image_tokens {cfg.base.model.image_tokens}",
            ("probe.positions", "base.model.image_tokens"),
        )
    if cfg.probe.block > cfg.base.model.n_layer:
        yield (
            f"probe.block = {cfg.probe.block}: must be at most base.model.n_layer {cfg.base.model.n_layer}",
            ("probe.block", "base.model.n_layer"),
        )
