"""The rules of representation alignment."""

from __future__ import annotations

from collections.abc import Iterator

from megastar.config.rules.problem import Problem, words
from megastar.config.schema import ModelConfig
from megastar.config.sections.repa import ENCODERS, RepaConfig


def repa_rules(r: RepaConfig, m: ModelConfig) -> Iterator[Problem]:
    if r.online:
        yield Problem(
            "repa.online = true: features are not computed in training; store them with megastar pretokenize --features, "
            "and set repa.online to false",
            ("repa.online",),
        )
    if r.block > m.n_layer:
        yield Problem(
            f"repa.block = {r.block}: must be at most model.n_layer {m.n_layer}", ("repa.block", "model.n_layer")
        )
    if r.encoder and r.encoder not in ENCODERS and not all(r.encoder.partition(":")):
        yield Problem(
            f"repa.encoder = {r.encoder}: must be {words([*ENCODERS, 'module:function'])}, or empty", ("repa.encoder",)
        )
    if r.encoder == "efflite0" and r.encoder_weights:
        yield Problem(
            f"repa.encoder_weights = {r.encoder_weights}: the weights of efflite0 are those of a package; leave it empty",
            ("repa.encoder_weights", "repa.encoder"),
        )
