"""The sampler of each variant: the section ``sample``, and what a variant's overrides change of its parallel decoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megastar.config.comparison import CompareConfig, SampleConfig, VariantConfig
from megastar.config.load import override_sample
from megastar.config.schema import ModelConfig
from megastar.errors import UserError

if TYPE_CHECKING:
    from megastar.sampling.options import SamplingOptions

DECODING = ("parallel_steps", "schedule", "token_order")  # the fields that a variant may override
PREFIX = "sample."
MOST_TOKENS = 65536


def training_overrides(variant: VariantConfig) -> list[str]:
    """The overrides of the run, without those of the sampler."""
    return [text for text in variant.overrides if not text.startswith(PREFIX)]


def sampler_of(cfg: CompareConfig, variant: str) -> SampleConfig:
    """The sampler of ``variant``. Raises ``UserError`` for overrides that are unknown or must be equal for all variants."""
    own = [text for text in cfg.variants[variant].overrides if text.startswith(PREFIX)]
    for text in own:
        field = text.partition("=")[0].removeprefix(PREFIX)
        if field in vars(cfg.sample) and field not in DECODING:
            raise UserError(
                f"variants.{variant}.overrides contains {text}, which is equal for all variants: set it in the section sample; "
                f"a variant may set {PREFIX}{f', {PREFIX}'.join(DECODING)}"
            )
    return override_sample(cfg.sample, own, f"variant {variant}") if own else cfg.sample


def decoding_fields(s: SampleConfig) -> dict[str, Any]:
    """The fields of parallel decoding that are not the defaults."""
    return {name: getattr(s, name) for name in DECODING if getattr(s, name) != getattr(SampleConfig(), name)}


def recorded_sampler(s: SampleConfig) -> dict[str, Any]:
    """The fields by which a result is found again: those of parallel decoding only where set, as older results lack them."""
    return {name: value for name, value in asdict(s).items() if name not in DECODING} | decoding_fields(s)


def options_of(s: SampleConfig) -> SamplingOptions:
    from megastar.sampling.options import SamplingOptions

    return SamplingOptions(
        cfg_scale=s.cfg_scale, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
        parallel_steps=s.parallel_steps, schedule=s.schedule, token_order=s.token_order,
    )  # fmt: skip


def check_samplers(cfg: CompareConfig, models: Iterable[tuple[str, ModelConfig]]) -> None:
    """Raise ``UserError`` if the networks (variant, model) cannot be probed and sampled as the configuration says."""
    for variant, model in models:
        sample = sampler_of(cfg, variant)
        if not model.class_dropout_prob:
            scale = f", and guidance (sample.cfg_scale = {sample.cfg_scale:g})" if sample.cfg_scale != 1 else ""
            raise UserError(
                f"variant {variant}: model.class_dropout_prob = 0 does not train the null class, which the probe of each run"
                f"{scale} needs: set model.class_dropout_prob above 0, as 0.1"
            )
        if not decoding_fields(sample):
            continue
        # The number of tokens may be unknown until the codes are made.
        options, known = options_of(sample), model
        if "image_tokens" in model.unset:
            known = replace(model, image_tokens=MOST_TOKENS)
            options = replace(options, parallel_steps=0) if options.schedule == "diagonal" else options
        if problems := options.problems(known):
            raise UserError(f"variant {variant}: sample.{problems[0]}")


def decoding_words(s: SampleConfig) -> str:
    """How the tokens are drawn where it is not one by one in raster order, else an empty text."""
    order = {"auto": "random" if s.parallel_steps else "raster"}.get(s.token_order, s.token_order)
    if s.schedule == "diagonal":
        return "one diagonal per step"
    if s.parallel_steps:
        return f"{s.parallel_steps} steps ({s.schedule}), {order} order"
    return f"{order} order, one by one" if order != "raster" else ""
