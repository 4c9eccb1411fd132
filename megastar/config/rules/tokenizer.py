"""The rules of a tokenizer and of its training."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megastar.config.rules.problem import Problem, words
from megastar.config.rules.tracking import tracker_problems
from megastar.config.schema import TokenizerConfig, TokenizerTrainConfig

PATCH_GAN = 24  # pixels: its three strides of 2 and two convolutions without leave one logit


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


def tokenizer_rules(cfg: TokenizerTrainConfig) -> Iterator[Problem]:
    yield from tokenizer_problems(cfg.tokenizer)
    yield from tracker_problems(cfg.trackers, "trackers")
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
    elif cfg.lpips_vgg and not cfg.perceptual:
        yield Problem(
            f"lpips_vgg = {cfg.lpips_vgg}: not used with perceptual 0: set perceptual above 0, or leave out lpips_vgg and "
            f"lpips_linear",
            ("lpips_vgg", "perceptual"),
        )
    if cfg.adversarial and cfg.tokenizer.image_size < PATCH_GAN:
        yield Problem(
            f"adversarial = {cfg.adversarial}: the discriminator needs images of at least {PATCH_GAN} pixels, and "
            f"tokenizer.image_size is {cfg.tokenizer.image_size}: set adversarial to 0",
            ("adversarial", "tokenizer.image_size"),
        )
    if not cfg.pictures:
        yield Problem("pictures is empty: name a folder of class folders, a .tar, or a folder of tars", ("pictures",))
    if not cfg.out:
        yield Problem("out is empty: name the run folder", ("out",))
