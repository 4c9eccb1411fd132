"""Which scores of a run are of the settings of its comparison."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.data.pretokenize.runner import pretokenize
from megastar.evaluation.features import open_network
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.reference import read_reference
from megastar.experiments.evaluation import Evaluation
from megastar.experiments.plan import codes_folder, plan_runs
from megastar.experiments.results import gather
from megastar.experiments.training_scores import is_of, wanted_scores
from megastar.run_dir.evaluations import append_evaluation
from tests.unit.evaluation.test_evaluation import random_images, tokenizer_file
from tests.unit.experiments.test_compare import small

LIKE = "like the training shards"


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """A comparison with codes, and the references that a run could name instead; as a function of the overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "channel_means.py").write_text("def means(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    for i, pixels in enumerate(random_images(8)):
        folder = tmp_path / "pictures" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    file = tokenizer_file(tmp_path)
    pretokenize(tmp_path / "pictures", "train", file, tmp_path / "out" / "codes" / "train", crops="center")
    return lambda *words: small(tmp_path, f"base.data.tokenizer={file}", "base.eval.samples=1000", *words)


def line(cfg, against=None, **more):
    """As a run with the settings of ``cfg`` records it (engine/evaluation/scheduled.py): the reference is read."""
    e = cfg.base.eval
    real = against or e.against or codes_folder(cfg, "train")
    tokenizer, limit = (None, None) if e.against else (cfg.base.data.tokenizer, e.against_images or None)
    o = EvaluationOptions(real_subset=e.against_subset or None, real_tokenizer=tokenizer)
    network = open_network("channel_means:means")
    reference = read_reference(real, 16, network, o, keep=False, spatial=False, limit=limit)
    found = {"step": 4, "epoch": 2.0, "metric": "FD-EffLite0", "value": 9.0, "samples": e.samples, "key": "k"}
    found |= {"cfg_scale": e.cfg_scale, "weights": e.weights, "against": str(real), "reference": reference.metadata}
    return found | {"labels": LIKE if e.labels == "data" else "balanced"} | more


def test_a_score_of_the_same_settings_is_kept(comparison):
    for words in ([], ["base.eval.against_images=3"], ["base.eval.labels=balanced"], ["base.eval.against=pictures"]):
        cfg = comparison(*words)
        assert is_of(line(cfg), wanted_scores(cfg))


def test_scores_of_other_settings_are_left_out(comparison):
    cfg = comparison()
    ours, wanted = line(cfg), wanted_scores(cfg)
    for change in (
        {"samples": 500},
        {"cfg_scale": 3.0},
        {"weights": "student"},
        {"metric": "FID"},
        {"labels": "balanced"},
    ):
        assert not is_of(ours | change, wanted)
    fid = wanted_scores(comparison("base.eval.metric=fid", "base.eval.inception=i.pth"))
    assert is_of(ours | {"metric": "FID@0123abcd"}, fid) and not is_of(ours, fid)


def test_another_reference_is_told_from_another_path(comparison, tmp_path):
    cfg = comparison()
    wanted = wanted_scores(cfg)
    for words in (["base.eval.against_images=3"], ["base.eval.against=pictures"]):
        other = comparison(*words)
        assert not is_of(line(other), wanted) and not is_of(line(cfg), wanted_scores(other))
    assert is_of(line(cfg, tmp_path / "out/codes/train"), wanted)  # absolute
    named = comparison("base.eval.against=pictures")
    part = comparison("base.eval.against=pictures", "base.eval.against_subset=train")
    shutil.copytree("pictures", "copy")
    assert is_of(line(named, "copy"), wanted_scores(named))
    assert not is_of(line(part), wanted_scores(named)) and not is_of(line(named), wanted_scores(part))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(Path("pictures/train/class0/0.png"))
    assert not is_of(line(named, "copy"), wanted_scores(named))


def test_old_lines_and_references_that_are_gone_are_compared_by_the_path(comparison, caplog):
    cfg = comparison("base.eval.against=pictures")
    ours = line(cfg)
    old = {name: value for name, value in ours.items() if name not in ("reference", "labels")}
    assert is_of(old, wanted_scores(cfg)) and not is_of(old | {"against": "other"}, wanted_scores(cfg))
    assert not caplog.records
    shutil.rmtree("pictures")
    with caplog.at_level(logging.WARNING):
        wanted = wanted_scores(cfg)
    assert "the reference of base.eval cannot be read (" in caplog.text and "by its path, pictures" in caplog.text
    assert is_of(ours, wanted) and not is_of(ours | {"against": "other"}, wanted)


def test_the_table_has_the_scores_of_the_present_reference_only(comparison):
    """Of runs that had finished with another one, none."""
    before, now = comparison("base.eval.against_images=3"), comparison()
    first, second = plan_runs(now, 0)[:2]
    for run, cfg in ((first, before), (second, now)):
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text('{"step": 8, "loss": 1.0}\n')
        append_evaluation(run.folder, line(cfg))
    evaluation = Evaluation(now)
    found = [gather(run, evaluation, {}, "digest")["scored"] for run in (first, second)]
    assert found[0] == [] and [r["value"] for r in found[1]] == [9.0]
