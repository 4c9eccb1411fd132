"""The rules of the network's fields and of the objectives' on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megastar.config.rules.problem import Problem, divisors, near, words
from megastar.config.schema import ModelConfig, SelfGuidedConfig


def tensor_parallel_degrees(m: ModelConfig) -> list[int]:
    """Degrees that divide the heads, the SwiGLU width and the vocabulary, unless the head is factorised (it is replicated)."""
    return divisors(math.gcd(m.n_head, m.ffn_dim, *([m.vocab_size] if m.head == "full" else [])))


def model_problems(m: ModelConfig) -> Iterator[Problem]:
    if m.dim % m.n_head:
        yield Problem(
            f"model.n_head = {m.n_head}: must divide model.dim {m.dim}; "
            f"use {words(near([d for d in divisors(m.dim) if m.dim // d % 4 == 0], m.n_head))}",
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


def self_guided_rules(s: SelfGuidedConfig, m: ModelConfig) -> Iterator[Problem]:
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
