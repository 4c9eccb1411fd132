"""Which lines of evaluations.jsonl are the scores of one curve: after a rollback, and with another reference."""

from __future__ import annotations

import json

import pytest

from megastar.run_dir.evaluations import append_evaluation, describe_reference, epochs_to, read_evaluations
from megastar.run_dir.layout import ROLLBACKS

SCORE = {"metric": "FID", "samples": 9, "cfg_scale": 1.0, "weights": "ema", "against": "a", "key": "k"}


def score(run, step, value, **more):
    append_evaluation(run, SCORE | {"step": step, "epoch": step / 10, "value": value} | more)


def roll_back(run, step, to):
    with (run / ROLLBACKS).open("a") as f:
        f.write(json.dumps({"step": step, "to": to, "position": step + 1}) + "\n")


def values(run):
    return {r["step"]: r["value"] for r in read_evaluations(run)}


def test_scores_of_discarded_weights_are_not_read(tmp_path):
    score(tmp_path, 5, 60.0, rollbacks=0)
    score(tmp_path, 10, 20.0, rollbacks=0)
    assert epochs_to(read_evaluations(tmp_path), [20]) == {20: 1.0}
    roll_back(tmp_path, 12, "step-00000008")
    assert values(tmp_path) == {5: 60.0}  # step 10 is to come again; also where eval.every has changed, or it fails
    assert epochs_to(read_evaluations(tmp_path), [20]) == {20: None}
    score(tmp_path, 10, 40.0, rollbacks=1)
    score(tmp_path, 15, 18.0, rollbacks=1)
    assert values(tmp_path) == {5: 60.0, 10: 40.0, 15: 18.0}
    assert epochs_to(read_evaluations(tmp_path), [20]) == {20: 1.5}
    roll_back(tmp_path, 16, "step-00000004")
    assert values(tmp_path) == {}
    score(tmp_path, 5, 50.0, rollbacks=2)
    assert values(tmp_path) == {5: 50.0}


def test_a_score_of_the_checkpoint_itself_is_kept(tmp_path):
    score(tmp_path, 8, 30.0, rollbacks=0)
    roll_back(tmp_path, 12, "step-00000008")
    assert values(tmp_path) == {8: 30.0}


def test_lines_of_older_versions_are_read_as_before(tmp_path):
    score(tmp_path, 10, 20.0)
    roll_back(tmp_path, 12, "step-00000008")
    assert values(tmp_path) == {10: 20.0} and read_evaluations(tmp_path, 8) == []
    score(tmp_path, 10, 40.0, rollbacks=1)
    assert values(tmp_path) == {10: 40.0}


def test_a_damaged_record_of_a_rollback_discards_nothing(tmp_path):
    score(tmp_path, 10, 20.0, rollbacks=0)
    for name in ("latest", "step-x", "step-99999999999"):
        roll_back(tmp_path, 12, name)
    assert values(tmp_path) == {10: 20.0}


REFERENCE = {"source": "codes/train", "subset": None, "pictures": 50_000, "size": 256, "sha256": "ab" * 32}
RECORDED = {"against": "codes/train", "labels": "like the training shards", "reference": REFERENCE}


@pytest.mark.parametrize(
    "change",
    [
        {"reference": REFERENCE | {"pictures": 1000}},  # eval.against_images
        {"reference": REFERENCE | {"subset": "test"}},  # eval.against_subset
        {"reference": REFERENCE | {"sha256": "cd" * 32}},  # other images in the same place
        {"labels": "balanced"},
        {"against": "elsewhere", "reference": "damaged"},
    ],
)
def test_scores_of_another_reference_are_another_curve(tmp_path, change):
    score(tmp_path, 5, 10.0, **RECORDED)
    score(tmp_path, 10, 40.0, **RECORDED | change)
    assert values(tmp_path) == {10: 40.0} and epochs_to(read_evaluations(tmp_path), [20]) == {20: None}
    score(tmp_path, 15, 15.0, **RECORDED)
    assert values(tmp_path) == {5: 10.0, 15: 15.0}


def test_the_same_reference_in_another_place_is_the_same_curve(tmp_path):
    """``data.shards`` as an absolute path, or a copy of ``eval.against``."""
    score(tmp_path, 5, 19.0, **RECORDED)
    moved = "/data/codes/train"
    score(tmp_path, 10, 18.0, **RECORDED | {"against": moved, "reference": REFERENCE | {"source": moved}})
    assert values(tmp_path) == {5: 19.0, 10: 18.0} and epochs_to(read_evaluations(tmp_path), [20]) == {20: 0.5}


@pytest.mark.parametrize("reference", [None, [], "x", {}, {"sha256": 5}, {"sha256": None}, {"sha256": ["a"]}])
def test_lines_without_the_hash_of_a_reference_are_compared_by_its_path(tmp_path, reference):
    for step, line in enumerate(({}, {"reference": reference}, RECORDED | {"against": "a"}, {"reference": reference})):
        score(tmp_path, step, 10.0 + step, **line)
    assert values(tmp_path) == {0: 10.0, 1: 11.0, 2: 12.0, 3: 13.0}
    score(tmp_path, 4, 14.0, against="b", reference=reference)
    assert values(tmp_path) == {4: 14.0}


def test_the_reference_in_words():
    assert describe_reference(RECORDED) == "codes/train, 50000 images"
    published = REFERENCE | {"pictures": None}
    assert describe_reference({"against": "VIRTUAL.npz", "reference": published}) == "VIRTUAL.npz"
    assert describe_reference({"against": "photos", "reference": REFERENCE | {"subset": "test"}}) == (
        "photos, subset test, 50000 images"
    )
    assert describe_reference({"against": "a", "reference": {"subset": 5}}) == "a"
    assert describe_reference({}) == "a reference that is not recorded"
