"""Scores while training in a comparison: a run that ended in its last evaluation, evaluations that are added later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megastar.cli import main
from megastar.run_dir.checkpoint_dir import latest
from tests.integration.test_compare import write_comparison

pytestmark = [pytest.mark.dist, pytest.mark.long]
EVALUATED = ["base.eval.every=10", "base.eval.samples=8", "base.eval.batch=8", "base.eval.thresholds=[1e9]"]


def scores(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def column(out: Path) -> dict[str, str]:
    """Variant -> its cell of the table of epochs to a score."""
    table = (out / "table.md").read_text().partition("## Epochs to a score")[2].partition("## Cost")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows}


def test_the_score_of_a_last_step_is_caught_up(world, tmp_path, capsys):
    config, out = write_comparison(world, tmp_path), tmp_path / "out"
    fields = yaml.safe_load(config.read_text())
    fields["variants"]["random"] = {
        "label": "random order",
        "overrides": ["self_guided.enabled=false", "token_order.kind=random"],
    }
    del fields["variants"]["star"]
    fields |= {"seeds": [0], "curve": {"every": 0}}
    fields["base"]["train"] |= {"steps": 20, "save_every": 10, "val_every": 20}
    config.write_text(yaml.safe_dump(fields))
    command = ["compare", str(config)]
    assert main(command) == 0
    ar, random = (out / "runs" / f"{variant}-seed0" for variant in ("ar", "random"))
    text = (out / "table.md").read_text()
    assert (
        "(random order) |" in text and "in random order for random order, not comparable with the other losses" in text
    )
    pair = json.loads((out / "results.json").read_text())["summary"]["differences"]["ema"]["random - ar"]
    assert "validation loss" not in pair and "probe, last position (%)" in pair
    assert "Epochs to a score" not in text and not (ar / "evaluations.jsonl").exists()

    # Evaluations are added to finished runs: only their last step can be scored, so the first epoch is unknown.
    before = {run: latest(run / "checkpoints").stat().st_mtime_ns for run in (ar, random)}
    assert main([*command, *EVALUATED]) == 0
    assert [r["step"] for r in scores(ar)] == [20] and [r["step"] for r in scores(random)] == [20]
    assert column(out) == {"variant": "epochs to FD-EffLite0 ≤ 1e+09", "AR": "", "random order": ""}
    note = "no score of these settings: ar-seed0: 10; random-seed0: 10. Such a run counts"
    assert note in (out / "table.md").read_text()
    assert "ar-seed0: last score" in capsys.readouterr().out
    times = json.loads((out / "times.json").read_text())
    assert times["ar-seed0 last score"]["attempts"] == times["ar-seed0 train"]["attempts"] == 1

    # As after a kill in the last evaluation: all steps are saved, and their scores but the last one.
    kept = scores(ar)[0]
    (ar / "evaluations.jsonl").write_text(
        json.dumps(kept | {"step": 10, "epoch": kept["epoch"] / 2, "key": "0"}) + "\n"
    )
    assert main([*command, *EVALUATED]) == 0
    again = scores(ar)[-1]
    assert (again["step"], again["key"], again["value"]) == (20, kept["key"], kept["value"])
    printed = capsys.readouterr().out
    assert (
        "ar-seed0: last score" in printed and "random-seed0: last score" not in printed and ": train ..." not in printed
    )
    assert column(out)["AR"].endswith("(1/1)") and column(out)["random order"] == ""
    assert before == {run: latest(run / "checkpoints").stat().st_mtime_ns for run in (ar, random)}

    assert main([*command, *EVALUATED]) == 0  # nothing is left to do
    assert "last score" not in capsys.readouterr().out

    # Representation alignment needs features that these codes, which the runs were trained on, do not store.
    added = "variants.repa.overrides=[self_guided.enabled=false,repa.enabled=true]"
    assert main([*command, *EVALUATED, added]) == 2
    assert "variant repa: data.shards = " in capsys.readouterr().err and not (out / "runs/repa-seed0").exists()
