"""The rules of the section eval."""

from __future__ import annotations

from collections.abc import Iterator

from megastar.config.rules.problem import Problem
from megastar.config.schema import RunConfig
from megastar.config.sections.evaluation import LEAST_FID

FILES = {"fid": "inception", "fd_dinov2": "dinov2"}  # metric -> the field of its weights


def unused_thresholds(cfg: RunConfig, prefix: str = "") -> str:
    """The sentence about thresholds of a run that is never scored. No rule: configurations of old runs have to load."""
    return (
        f"{prefix}eval.thresholds = {cfg.eval.thresholds}: no score is compared with them, since {prefix}eval.every is 0: set "
        f"{prefix}eval.every, or {prefix}eval.thresholds=[]"
    )


def evaluation_rules(cfg: RunConfig) -> Iterator[Problem]:
    e = cfg.eval
    if not e.every:
        return
    if not cfg.data.tokenizer:
        yield Problem(
            f"eval.every = {e.every}: data.tokenizer, which decodes the samples, is empty: name it, or set eval.every to 0",
            ("eval.every", "data.tokenizer"),
        )
    for metric, name in FILES.items():
        file = getattr(e, name)
        if metric == e.metric and not file:
            yield Problem(
                f"eval.metric = {metric}: eval.{name}, the file of its network, is empty: name the file, or use eval.metric=fd",
                ("eval.metric", f"eval.{name}"),
            )
        elif metric != e.metric and file:
            yield Problem(
                f"eval.{name} = {file}: eval.metric {e.metric} does not use it: set eval.metric to {metric}, or leave "
                f"{name} out",
                (f"eval.{name}", "eval.metric"),
            )
    if e.metric == "fid" and e.samples < LEAST_FID:
        yield Problem(
            f"eval.samples = {e.samples}: FID requires at least {LEAST_FID} images; use 5000 or more",
            ("eval.samples", "eval.metric"),
        )
    if e.against_subset and not e.against:
        yield Problem(
            f"eval.against_subset = {e.against_subset}: applies to eval.against, which is empty: give it, or leave "
            "against_subset out",
            ("eval.against_subset", "eval.against"),
        )
    if e.cfg_scale != 1 and not cfg.model.class_dropout_prob:
        yield Problem(
            f"eval.cfg_scale = {e.cfg_scale:g}: guidance needs the null class, which model.class_dropout_prob 0 does not "
            "train: set eval.cfg_scale to 1",
            ("eval.cfg_scale", "model.class_dropout_prob"),
        )
