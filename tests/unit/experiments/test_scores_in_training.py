"""The scores of runs while they train, in a comparison: epochs to a score, and a last step that has no score."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megastar.experiments import tables
from megastar.experiments.comparison import Comparison
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.job_queue import Attempt
from megastar.experiments.plan import plan_runs
from tests.unit.experiments.test_compare import small, trained

SCORE = {"metric": "FD-EffLite0", "samples": 1000, "cfg_scale": 1.0, "weights": "ema", "against": "codes/train"}
STEPS = (200, 400, 500)  # every 200 of 500 steps, and the last one


def set_scores(results, curves: dict[str, dict[int, float]]) -> None:
    """Run -> step -> score, as ``gather`` reads them. 10 epochs are 200 steps."""
    results.cfg.base.eval.thresholds, results.cfg.base.eval.every = [50.0, 20.0], 200
    for run, curve in curves.items():
        results.rows[run]["scored"] = [SCORE | {"step": s, "epoch": s / 20, "value": v} for s, v in curve.items()]


def cells(results, label: str = "AR") -> list[str]:
    return next(row[1:] for row in tables.epochs_table(results) if row[0] == label)


def test_epochs_to_a_score(results):
    """Over the seeds that reached it, with the number of those that did; nothing where no run was scored."""
    assert len(tables.epochs_table(results)) == 1 and results.summary()["epochs_to"]["ar"] == {}
    curves = {0: (60, 40, 19), 1: (70, 55, 45), 2: (60, 50, 30)}
    set_scores(results, {f"ar-seed{seed}": dict(zip(STEPS, c, strict=True)) for seed, c in curves.items()})
    header, *rows = tables.epochs_table(results)
    assert header == ["variant", "epochs to FD-EffLite0 ≤ 50", "epochs to FD-EffLite0 ≤ 20"]
    assert cells(results) == ["21.7 ± 2.9 (3/3)", "25.0 (1/3)"]  # 20, 25, 20; 25
    assert all(row[1:] == ["", ""] for row in rows if row[0] != "AR")
    assert results.summary()["epochs_to"]["ar"]["20"] == {"epochs": [25.0], "runs": 3}
    text = tables.markdown(results, results.summary(), "megastar compare x.yaml")
    assert "## Epochs to a score" in text and "not interpolated: evaluations every 200 steps" in text
    assert "cfg_scale 1, against codes/train. (reached/scored) counts runs" in text
    for line in results.rows["ar-seed0"]["scored"]:  # results.json of a version that did not look at the reference
        line["reference"] = {"sha256": "ab", "subset": "test", "pictures": 9}
    assert "against codes/train, subset test, 9 images and codes/train. (" in tables.epochs_note(results)
    note = tables.unscored_note(results)
    assert " ar-seed" not in note and "ar2-seed1: all; " in note and "star-seed2" not in note  # it has steps left


def test_a_run_counts_if_its_first_epoch_is_known(results):
    """Scores that were added to a run that has begun, or finished, do not say when it was first at or below a threshold."""
    set_scores(
        results,
        {
            "ar-seed0": {200: 60, 400: 40, 500: 19},
            "ar-seed1": {400: 45, 500: 19},  # from step 400 on: step 200 may have been at or below 50
            "ar-seed2": {500: 19},
            "ar2-seed0": {200: 45, 500: 19},  # 50 was reached before the gap, 20 perhaps in it
        },
    )
    assert cells(results) == ["20.0 (1/1)", "25.0 (1/1)"]
    assert cells(results, "AR, two crops") == ["10.0 (1/1)", ""]
    note = tables.unscored_note(results)
    for words in ("ar-seed1: 200; ", "ar-seed2: 200, 400; ", ": ar2-seed0: 400; "):
        assert words in note
    assert " ar-seed0" not in note
    out = io.StringIO()
    tables.show(results, results.summary(), Console(file=out, width=200))
    assert "ar-seed2: 200, 400; " in " ".join(out.getvalue().split())
    assert note in tables.markdown(results, results.summary(), "x")


def test_a_score_that_is_missing_at_the_end_is_not_a_threshold_that_was_not_reached(results):
    set_scores(results, {"ar-seed0": {200: 60, 400: 55}, "ar-seed1": {200: 60, 400: 55, 500: 52}})
    assert cells(results) == ["not reached (0/1)", "not reached (0/1)"]
    results.rows["ar-seed0"]["done"] = 450  # it has steps left: what is known so far
    assert cells(results) == ["not reached (0/2)", "not reached (0/2)"]


def test_runs_of_several_intervals_are_read_at_the_present_one(results):
    """An earlier start scored every 50 steps: a finer grid reaches a threshold earlier."""
    set_scores(results, {"ar-seed0": {50: 49, 100: 60, 150: 60, 200: 60, 400: 40, 500: 19}})
    assert cells(results) == ["20.0 (1/1)", "25.0 (1/1)"]
    results.cfg.base.eval.every = 20
    assert cells(results) == ["", ""] and "ar-seed0: 20, 40, 60, 80 and 17 more" in tables.unscored_note(results)


# The last step -------------------------------------------------------------------------------------------------------
def write_score(run, step: int, **fields: object) -> None:
    line = SCORE | {
        "step": step,
        "epoch": step / 4,
        "value": 30.0,
        "against": run.cfg.data.shards,
        "key": f"{step}",
        "rollbacks": 0,
    }
    with (run.folder / "evaluations.jsonl").open("a") as f:
        f.write(json.dumps(line | fields) + "\n")


@pytest.fixture
def scored(measured, tmp_path):
    """A comparison with scores while training, one of whose runs ended in the last evaluation: all of its steps are saved."""
    overrides = [
        "score.against=[test]",
        "base.data.tokenizer=tokenizer.bin",
        "base.eval.every=4",
        "base.eval.samples=1000",
    ]
    cfg = small(tmp_path, *overrides)
    runs, console = plan_runs(cfg, 0), Console(file=io.StringIO(), width=300)
    comparison = Comparison(cfg, runs, 0, "megastar compare", console)
    comparison.digests = dict.fromkeys(comparison.by_name, "")
    trained(runs[0], 4)
    trained(runs[0], 8)
    write_score(runs[0], 4)
    return comparison, runs[0]


def ended(job, status: int = 0) -> Attempt:
    return Attempt(job, status, 1.0, 1.0, interrupted=False)


def test_the_last_score_of_a_trained_run_is_caught_up(scored):
    comparison, run = scored
    job = comparison.next_job(run)
    assert (job.stage, job.args, job.done()) == ("last score", ["train", str(comparison.plan_file(run))], 0)
    write_score(run, 8)
    assert job.done() == 1
    following = comparison.job_ended(ended(job))
    assert [f.stage for f in following] == ["evaluate"] and not comparison.failed
    assert comparison.next_job(run).stage == "evaluate"  # also of a later start
    assert comparison.times()["ar-seed0 last score"]["attempts"] == 1 and "ar-seed0 train" not in comparison.times()


def test_a_last_score_of_other_settings_is_not_one(scored):
    comparison, run = scored
    for fields in ({"samples": 500}, {"weights": "student"}, {"cfg_scale": 2.0}):
        write_score(run, 8, **fields)
        assert comparison.next_job(run).stage == "last score"
    write_score(run, 8)
    assert comparison.next_job(run).stage == "evaluate"


@pytest.mark.parametrize("status", [0, 1, -9])
def test_a_score_that_fails_again_does_not_stop_the_comparison(scored, status):
    comparison, run = scored
    following = comparison.job_ended(ended(comparison.next_job(run), status))
    assert [f.stage for f in following] == ["evaluate"] and not comparison.failed
    assert "ar-seed0: its last step was not scored (base.eval), see " in comparison.console.file.getvalue()
    again = Comparison(comparison.cfg, comparison.runs, 0, "", Console(quiet=True))
    assert again.next_job(run).stage == "last score"  # the next call tries again


def test_an_evaluation_that_failed_in_training_is_not_repeated_at_once(scored):
    comparison, run = scored
    (run.folder / "checkpoints/step-00000008/megastar.json").unlink()
    job = comparison.next_job(run)
    assert job.stage == "train"
    trained(run, 8)
    assert [f.stage for f in comparison.job_ended(ended(job))] == ["evaluate"]


def test_runs_that_are_never_scored_have_nothing_to_catch_up(measured):
    run = plan_runs(measured.cfg, 0)[0]
    trained(run, 8)
    assert Comparison(measured.cfg, [run], 0, "", Console(quiet=True)).next_job(run).stage == "evaluate"
    assert isinstance(measured, Evaluation) and Path(measured.cfg.out).is_dir()
