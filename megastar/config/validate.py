"""The rules of a configuration: all violations are reported before anything is built. No torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from megastar.config.comparison import CompareConfig
from megastar.config.comparison import rules as comparison_rules
from megastar.config.env_text import recorded
from megastar.config.rules.evaluation import evaluation_rules
from megastar.config.rules.model import model_problems, self_guided_rules, tensor_parallel_degrees
from megastar.config.rules.problem import Problem, divisors, near, words
from megastar.config.rules.repa import repa_rules
from megastar.config.rules.token_order import token_order_rules
from megastar.config.rules.tokenizer import tokenizer_rules
from megastar.config.rules.tracking import profile_problems, tracker_problems
from megastar.config.schema import ModelConfig, RunConfig, TokenizerTrainConfig, TrainConfig


def find_problems(cfg: Any) -> list[Problem]:
    """All problems of a configuration: bounds of single fields, then rules."""
    found = list(_bounds(cfg))
    invalid = {name for problem in found for name in problem.fields}
    kinds: dict[type, Callable[[Any], Iterator[Problem]]] = {
        RunConfig: _run_rules,
        CompareConfig: _comparison_rules,
        TokenizerTrainConfig: tokenizer_rules,
    }
    rules = kinds[type(cfg)]
    return found + [p for p in rules(_with_defaults(cfg, invalid)) if not invalid & set(p.fields)]


def _with_defaults(cfg: Any, names: set[str]) -> Any:
    """A copy with the defaults of the fields ``names``: rules compute with numbers within the bounds only."""
    cfg = copy.deepcopy(cfg) if names else cfg
    for name in names:
        *sections, last = name.split(".")
        section = cfg
        with suppress(KeyError, AttributeError):  # a name of a variant with a dot in it: another rule refuses it
            for key in sections:
                section = section[key] if isinstance(section, dict) else getattr(section, key)
            setattr(section, last, getattr(type(section)(), last))
    return cfg


def _bounds(section: Any, prefix: str = "") -> Iterator[Problem]:
    """The metadata of schema.py: choices, low, high, above, below."""
    for f in fields(section):
        name, value, meta = prefix + f.name, getattr(section, f.name), f.metadata
        if is_dataclass(value):
            yield from _bounds(value, name + ".")
            continue
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from _bounds(inner, f"{name}.{key}.")
            continue
        if "choices" in meta:
            for one in value if isinstance(value, list) else [value]:
                if one not in meta["choices"]:
                    yield Problem(f"{name} = {recorded(value)}: must be {words(list(meta['choices']))}", (name,))
                    break
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                yield Problem(f"{name} = {one}: must be a finite number", (name,))
            elif "low" in meta and one < meta["low"]:
                yield Problem(f"{name} = {one}: must be at least {meta['low']}", (name,))
            elif "above" in meta and one <= meta["above"]:
                yield Problem(f"{name} = {one}: must be above {meta['above']}", (name,))
            elif "high" in meta and one > meta["high"]:
                yield Problem(f"{name} = {one}: must be at most {meta['high']}", (name,))
            elif "below" in meta and one >= meta["below"]:
                yield Problem(f"{name} = {one}: must be below {meta['below']}", (name,))


def _run_rules(cfg: RunConfig) -> Iterator[Problem]:
    yield from model_problems(cfg.model)
    if cfg.self_guided.enabled:
        yield from self_guided_rules(cfg.self_guided, cfg.model)
    if cfg.repa.enabled:
        yield from repa_rules(cfg.repa, cfg.model)
    yield from token_order_rules(cfg)
    m, tp, t = cfg.model, cfg.parallel.tensor_parallel, cfg.train
    legal = tensor_parallel_degrees(m)
    if tp not in legal:
        divided = [f"model.n_head {m.n_head}", f"the ffn width {m.ffn_dim}"]
        divided += [f"model.vocab_size {m.vocab_size}"] if m.head == "full" else []
        yield Problem(
            f"parallel.tensor_parallel = {tp}: must divide {', '.join(divided[:-1])} and {divided[-1]}; use {words(legal)}",
            ("parallel.tensor_parallel", "model.n_head", "model.dim", "model.multiple_of", "model.vocab_size"),
        )
    if t.steps == 0 and t.epochs == 0:
        yield Problem("train.steps and train.epochs are both 0: give one of them", ("train.steps", "train.epochs"))
    if t.micro_batch and t.global_batch % t.micro_batch:
        yield Problem(
            f"train.micro_batch = {t.micro_batch}: must divide train.global_batch {t.global_batch}; "
            f"use {words(near(divisors(t.global_batch), t.micro_batch))}",
            ("train.micro_batch", "train.global_batch"),
        )
    yield from _init_rules(t, m)
    yield from evaluation_rules(cfg)
    yield from tracker_problems(t.trackers, "train.trackers")
    yield from profile_problems(t)
    if t.upload and not (t.upload[:5].lower() == "s3://" and t.upload[5:].split("/")[0]):
        yield Problem(f"train.upload = {t.upload}: must have the form s3://bucket/prefix", ("train.upload",))
    if not cfg.run:
        yield Problem("run is empty: name the run folder", ("run",))
    if not cfg.data.shards:
        yield Problem(
            "data.shards is empty: name a folder of token shards (megastar pretokenize makes it)", ("data.shards",)
        )
    for name in ("shards", "val_shards"):
        scheme, mark, rest = getattr(cfg.data, name).partition("://")
        if mark and (scheme.lower() != "s3" or not rest.split("/")[0]):
            yield Problem(
                f"data.{name} = {scheme}://{rest}: must be a folder or have the form s3://bucket/prefix",
                (f"data.{name}",),
            )
    if "://" in cfg.data.cache:
        yield Problem(f"data.cache = {cfg.data.cache}: must be a local folder", ("data.cache",))


def _init_rules(t: TrainConfig, m: ModelConfig) -> Iterator[Problem]:
    if t.freeze_blocks > m.n_layer:
        yield Problem(
            f"train.freeze_blocks = {t.freeze_blocks}: must be at most model.n_layer {m.n_layer}",
            ("train.freeze_blocks", "model.n_layer"),
        )
    if not t.init:
        given = {
            "init_weights": t.init_weights,
            "init_classes": t.init_classes != "same" and t.init_classes,
            "init_class_map": t.init_class_map,
            "init_resize": t.init_resize,
            "init_any_order": t.init_any_order,
            "init_any_tokenizer": t.init_any_tokenizer,
            "freeze_blocks": t.freeze_blocks,
        }
        for name, value in given.items():
            if value:
                yield Problem(
                    f"train.{name} = {str(value).lower()}: applies to train.init, which is empty: give it, or leave "
                    f"{name} out",
                    (f"train.{name}", "train.init"),
                )
    elif t.init_class_map and t.init_classes != "map":
        yield Problem(
            f"train.init_class_map = {t.init_class_map}: needs train.init_classes=map, not {t.init_classes}",
            ("train.init_class_map", "train.init_classes"),
        )


def _comparison_rules(cfg: CompareConfig) -> Iterator[Problem]:
    for text, names in comparison_rules(cfg):
        yield Problem(text, names)
    for problem in _run_rules(cfg.base):
        if problem.fields not in (("run",), ("data.shards",)):  # the comparison sets them
            yield Problem(f"base: {problem.text}", tuple(f"base.{name}" for name in problem.fields))
