"""The rules of representation alignment."""

from __future__ import annotations

from collections.abc import Iterator

from megastar.config.rules.problem import Problem, words
from megastar.config.schema import ModelConfig
from megastar.config.sections.repa import ENCODERS, RepaConfig


def repa_rules(r: RepaConfig, m: ModelConfig) -> Iterator[Problem]:
    if r.online and not r.encoder:
        yield Problem(
            f"repa.online = true needs repa.encoder: name {words([*ENCODERS, 'module:function'])}",
            ("repa.online", "repa.encoder"),
        )
    if r.online and not r.pictures:
        yield Problem(
            "repa.online = true needs repa.pictures: name the images that the shards were made from",
            ("repa.online", "repa.pictures"),
        )
    if not r.online and (r.pictures or r.feature_pool):
        unused = f"repa.pictures = {r.pictures}" if r.pictures else "repa.feature_pool = true"
        yield Problem(
            f"{unused} is used with repa.online alone, which is false: set repa.online=true, or remove it",
            ("repa.online", "repa.pictures", "repa.feature_pool"),
        )
    if r.online and r.encoder in ("dinov2", "dinov3") and not r.encoder_weights:
        yield Problem(
            f"repa.encoder = {r.encoder} needs the file of its weights: set repa.encoder_weights",
            ("repa.encoder", "repa.encoder_weights"),
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
