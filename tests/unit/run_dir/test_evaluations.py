"""Which lines of evaluations.jsonl are the scores of a run that was rolled back."""

from __future__ import annotations

import json

from megastar.run_dir.evaluations import append_evaluation, epochs_to, read_evaluations
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
