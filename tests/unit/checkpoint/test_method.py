"""The method that a run's weights record, and what the model card says of it."""

from __future__ import annotations

import pytest

from megastar.checkpoint.convert import convert
from megastar.checkpoint.convert_weights import open_weights
from megastar.checkpoint.hub.card import CardFacts, model_card
from megastar.config.schema import TokenizerConfig
from megastar.evaluation.published import METHODS
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config

ALONE, REPA = {"enabled": False}, {"enabled": True}
RANDOM = {"token_order": {"kind": "random"}, "model": {"target_position": "embedding"}}
CASES = [
    ("ar", {"self_guided": ALONE}, "next-token prediction (AR baseline)"),
    ("star", {}, "ST-AR (self-guided training)"),
    ("repa", {"self_guided": ALONE, "repa": REPA}, "next-token prediction with REPA"),
    ("star+repa", {"repa": REPA}, "ST-AR (self-guided training) with REPA"),
    ("random", {"self_guided": ALONE, **RANDOM}, "next-token prediction in random token order"),
    ("star+random", RANDOM, "ST-AR (self-guided training) in random token order"),
    ("ar", {"self_guided": ALONE, "repa": {"enabled": True, "weight": 0.0}}, "next-token prediction (AR baseline)"),
]  # fmt: skip


def card(provenance: dict) -> str:
    return model_card(config().model, provenance, TokenizerConfig(), CardFacts(), 1, "float32")


@pytest.mark.parametrize(("name", "changes", "words"), CASES)
def test_weights_of_a_run_record_its_method(tmp_path, name, changes, words):
    write_checkpoint(tmp_path / "run", config(data={"shards": "codes"}, **changes), 1, 1)
    convert(tmp_path / "run", "safetensors", tmp_path / "w.safetensors")
    provenance = open_weights(tmp_path / "w.safetensors").provenance
    assert provenance["method"] == name
    assert (name in METHODS) == ("+" not in name and name != "random")
    text = card(provenance)
    assert f"| method | {words} |" in text and f"trained with megastar: {words}. It" in text


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({"self_guided": True}, "ST-AR (self-guided training)"),
        ({"self_guided": False}, "next-token prediction (AR baseline)"),
        ({}, None),
        ({"method": "a | b\n# c", "self_guided": True}, None),
        ({"method": ["ar"], "self_guided": True}, None),
        ({"method": "", "self_guided": True}, None),
    ],
)
def test_older_and_foreign_provenance(provenance, words):
    text = card(provenance)
    assert (
        f"| method | {words} |" in text if words else "| method |" not in text and "trained with megastar. It" in text
    )


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({"self_guided": ALONE}, {"views": 1}),
        ({"self_guided": ALONE | {"baseline_views": 2}}, {"views": 2}),
        (
            {"self_guided": ALONE, "repa": REPA | {"encoder": "efflite0"}},
            {"views": 1, "repa_encoder": "efflite0", "repa_weight": 0.5, "repa_block": 1},
        ),
    ],
)
def test_weights_of_a_run_record_its_crops_and_losses(tmp_path, changes, objective):
    write_checkpoint(tmp_path / "run", config(data={"shards": "codes"}, **changes), 1, 1)
    convert(tmp_path / "run", "safetensors", tmp_path / "w.safetensors")
    assert open_weights(tmp_path / "w.safetensors").provenance["objective"] == objective
