"""The rules of a configuration: all violations are reported before anything is built. No torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megastar.config.comparison import CompareConfig
from megastar.config.comparison import rules as comparison_rules
from megastar.config.env_text import recorded
from megastar.config.schema import (
    ModelConfig,
    RunConfig,
    SelfGuidedConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Problem:
    """One sentence, and the dotted fields that it concerns. Rules about these are not checked further."""

    text: str
    fields: tuple[str, ...]


def divisors(n: int) -> list[int]:
    """All divisors, or for a huge ``n`` those below a million and their quotients."""
    small = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def words(values: list[Any]) -> str:
    """1, 2 or 4"""
    shown = [str(v) for v in values] or ["other values"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def tensor_parallel_degrees(m: ModelConfig) -> list[int]:
    """Degrees that divide the heads, the SwiGLU width and the vocabulary, unless the head is factorised (it is replicated)."""
    return divisors(math.gcd(m.n_head, m.ffn_dim, *([m.vocab_size] if m.head == "full" else [])))


def find_problems(cfg: Any) -> list[Problem]:
    """All problems of a configuration: bounds of single fields, then rules."""
    found = list(_bounds(cfg))
    invalid = {name for problem in found for name in problem.fields}
    kinds: dict[type, Callable[[Any], Iterator[Problem]]] = {
        RunConfig: _run_rules,
        CompareConfig: _comparison_rules,
        TokenizerTrainConfig: _tokenizer_rules,
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
            if value not in meta["choices"]:
                yield Problem(f"{name} = {recorded(value)}: must be {words(list(meta['choices']))}", (name,))
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
        yield from _self_guided_rules(cfg.self_guided, cfg.model)
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
            f"use {words(_near(divisors(t.global_batch), t.micro_batch))}",
            ("train.micro_batch", "train.global_batch"),
        )
    yield from _init_rules(t, m)
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


def _near(values: list[int], wanted: int, count: int = 4) -> list[int]:
    """The few values nearest to the wanted one."""
    return sorted(sorted(values, key=lambda v: abs(v - wanted))[:count])


def model_problems(m: ModelConfig) -> Iterator[Problem]:
    if m.dim % m.n_head:
        yield Problem(
            f"model.n_head = {m.n_head}: must divide model.dim {m.dim}; "
            f"use {words(_near([d for d in divisors(m.dim) if m.dim // d % 4 == 0], m.n_head))}",
            ("model.n_head", "model.dim"),
        )
    elif m.head_dim % 4:
        yield Problem(
            f"model.dim / model.n_head = {m.dim} / {m.n_head} = {m.head_dim}: must be a multiple of 4 (2-D rotary pairs)",
            ("model.n_head", "model.dim"),
        )
    if m.grid**2 != m.image_tokens:
        side = math.isqrt(m.image_tokens)
        yield Problem(
            f"model.image_tokens = {m.image_tokens}: must be a square number, as {side**2} or {(side + 1) ** 2}",
            ("model.image_tokens",),
        )
    if m.head == "full" and m.head_factors:
        yield Problem(
            f"model.head_factors = {m.head_factors}: model.head full has no sub-codes; set model.head to factorised, "
            "or head_factors to []",
            ("model.head_factors", "model.head"),
        )
    if m.head == "factorised" and len(m.head_factors) < 2:
        yield Problem(
            f"model.head_factors = {m.head_factors}: model.head factorised needs two or more numbers whose product is "
            f"model.vocab_size {m.vocab_size}",
            ("model.head_factors", "model.head"),
        )
    elif m.head == "factorised" and math.prod(m.head_factors) != m.vocab_size:
        yield Problem(
            f"model.head_factors = {m.head_factors}: their product {math.prod(m.head_factors)} must be "
            f"model.vocab_size {m.vocab_size}",
            ("model.head_factors", "model.vocab_size", "model.head"),
        )


def _self_guided_rules(s: SelfGuidedConfig, m: ModelConfig) -> Iterator[Problem]:
    here = "self_guided."
    if s.view_loss and s.views < 2:
        yield Problem(
            f"{here}views = {s.views}: the view loss compares two crops; set views to 2, or view_loss to false",
            (here + "views",),
        )
    if s.student_views > s.views:
        yield Problem(
            f"{here}student_views = {s.student_views}: must be at most {here}views {s.views}",
            (here + "student_views", here + "views"),
        )
    if (s.step_loss or s.view_loss) and s.contrastive_block > m.n_layer:
        yield Problem(
            f"{here}contrastive_block = {s.contrastive_block}: must be at most model.n_layer {m.n_layer}",
            (here + "contrastive_block", "model.n_layer"),
        )
    if s.step_loss and s.positions < 2:
        yield Problem(
            f"{here}positions = {s.positions}: the step loss compares two positions; "
            "set positions to 2 or more, or step_loss to false",
            (here + "positions",),
        )
    if (s.step_loss or s.view_loss) and s.positions >= m.image_tokens:
        yield Problem(
            f"{here}positions = {s.positions}: must be at most {m.image_tokens - 1} (model.image_tokens without the class position)",
            (here + "positions", "model.image_tokens"),
        )


def tokenizer_problems(t: TokenizerConfig) -> Iterator[Problem]:
    here = "tokenizer."
    if not t.channel_multipliers:
        yield Problem(f"{here}channel_multipliers is empty: give one number per level", (here + "channel_multipliers",))
        return
    if t.image_size % t.downsample:
        yield Problem(
            f"{here}image_size = {t.image_size}: must be a multiple of {t.downsample} "
            f"({len(t.channel_multipliers)} levels)",
            (here + "image_size", here + "channel_multipliers"),
        )
    widths = sorted({t.channels * m for m in t.channel_multipliers})
    odd = [w for w in widths if w % t.norm_groups]
    if odd:
        yield Problem(
            f"{here}norm_groups = {t.norm_groups}: must divide the width of every level, but does not divide {words(odd)}",
            (here + "norm_groups", here + "channels", here + "channel_multipliers"),
        )
    yield from _quantizer_problems(t)


def _quantizer_problems(t: TokenizerConfig) -> Iterator[Problem]:
    """The number of codes that a quantizer without a codebook has."""
    here = "tokenizer."
    size, dim = (here + "codebook_size", t.codebook_size), (here + "codebook_embed_dim", t.codebook_embed_dim)
    kind = here + "quantizer"
    if t.quantizer != "fsq" and t.fsq_levels:
        yield Problem(
            f"{here}fsq_levels = {t.fsq_levels}: {kind} {t.quantizer} has no levels; set {kind} to fsq, or fsq_levels to []",
            (here + "fsq_levels", kind),
        )
    if t.quantizer == "lfq" and t.codebook_size & (t.codebook_size - 1):
        below = 1 << t.codebook_size.bit_length() - 1
        yield Problem(
            f"{size[0]} = {size[1]}: {kind} lfq has one bit per channel, so it must be a power of two, as {below} or {2 * below}",
            (size[0], kind),
        )
    elif t.quantizer == "lfq" and t.codebook_size != 1 << t.codebook_embed_dim:
        bits = t.codebook_size.bit_length() - 1
        yield Problem(
            f"{dim[0]} = {dim[1]}: {kind} lfq has one bit per channel, so {size[1]} codes need {bits}; set it to {bits}",
            (dim[0], size[0], kind),
        )
    if t.quantizer != "fsq":
        return
    if not t.fsq_levels:
        yield Problem(
            f"{here}fsq_levels is empty: {kind} fsq needs the number of values of each channel, as [8, 8, 8, 6, 5]",
            (here + "fsq_levels", kind),
        )
    elif math.prod(t.fsq_levels) != t.codebook_size:
        yield Problem(
            f"{size[0]} = {size[1]}: must be the product of {here}fsq_levels {t.fsq_levels}, {math.prod(t.fsq_levels)}",
            (size[0], here + "fsq_levels", kind),
        )
    elif len(t.fsq_levels) != t.codebook_embed_dim:
        yield Problem(
            f"{dim[0]} = {dim[1]}: must be the number of {here}fsq_levels {t.fsq_levels}, {len(t.fsq_levels)}",
            (dim[0], here + "fsq_levels", kind),
        )


def _tokenizer_rules(cfg: TokenizerTrainConfig) -> Iterator[Problem]:
    yield from tokenizer_problems(cfg.tokenizer)
    if not cfg.tokenizer.channel_multipliers:
        return
    if cfg.continuous_steps >= cfg.steps:
        yield Problem(
            f"continuous_steps = {cfg.continuous_steps}: must be below steps {cfg.steps}, otherwise no codebook is made",
            ("continuous_steps", "steps"),
        )
    if cfg.tokenizer.quantizer != "vq" and cfg.continuous_steps:
        yield Problem(
            f"continuous_steps = {cfg.continuous_steps}: only tokenizer.quantizer vq starts without quantization, "
            f"{cfg.tokenizer.quantizer} does not: set it to 0",
            ("continuous_steps", "tokenizer.quantizer"),
        )
    elif cfg.init and cfg.continuous_steps:
        yield Problem(
            f"continuous_steps = {cfg.continuous_steps}: k-means would replace the codebook of init {cfg.init}: set it to 0",
            ("continuous_steps", "init"),
        )
    if bool(cfg.lpips_vgg) != bool(cfg.lpips_linear):
        given, other = ("lpips_vgg", "lpips_linear") if cfg.lpips_vgg else ("lpips_linear", "lpips_vgg")
        yield Problem(
            f"{given} = {getattr(cfg, given)}: LPIPS needs both files, and {other} is empty: name it, or leave out both",
            (given, other),
        )
    if not cfg.pictures:
        yield Problem("pictures is empty: name a folder of class folders, a .tar, or a folder of tars", ("pictures",))
    if not cfg.out:
        yield Problem("out is empty: name the run folder", ("out",))
