"""What the contrastive losses of a run compare: all images of a step, or, in a run that began so, those of one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import megastar

pytestmark = [pytest.mark.dist, pytest.mark.long]
STILL = [f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")]
ONE_PASS = "self_guided.negatives=micro_batch"


def rows(run: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if "loss_ar" in row}


def forget(run: Path) -> None:
    """As a version without the fields wrote it."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["self_guided"]["negatives"], config["parallel"]["teacher_features"]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    for path in run.glob("checkpoints/step-*/megastar.json"):
        manifest = json.loads(path.read_text())
        del manifest["config"]["self_guided"]["negatives"], manifest["config"]["parallel"]["teacher_features"]
        path.write_text(json.dumps(manifest))


def test_logged_losses_do_not_depend_on_the_cut(world, tmp_path):
    found = {}
    for ranks, micro in ((1, 8), (1, 4), (1, 2), (1, 1), (2, 2)):
        run = tmp_path / f"run{ranks}-{micro}"
        config = world.write_config(tmp_path / "run.yaml", run, steps=3, micro_batch=micro, val_every=0)
        megastar("train", config, *STILL, ranks=ranks)
        found[ranks, micro] = rows(run)
    whole = found.pop((1, 8))
    names = ["loss", "loss_ar", "loss_mim", "loss_step", "loss_view", "acc_step", "spread_student", "spread_teacher"]
    for cut, steps in found.items():
        for step, row in steps.items():
            for name in [*names, "grad_norm"]:
                assert row[name] == pytest.approx(whole[step][name], rel=1e-5, abs=1e-6), (cut, step, name)
    assert whole[1]["loss_step"] > 2


def test_a_run_from_before_the_field_keeps_its_objective(world, tmp_path):
    """Its own command resumes it, bit for bit, with other lengths too; a reading that it did not have is refused."""
    expected = tmp_path / "expected"
    fields = {"micro_batch": 2, "val_every": 0, "save_every": 3}
    config = world.write_config(tmp_path / "run.yaml", expected, steps=6, **fields)
    megastar("train", config, ONE_PASS)
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=3, **fields)
    megastar("train", config, ONE_PASS)
    forget(run)
    done = megastar("train", config, "train.steps=5")
    assert "keeps self_guided.negatives=micro_batch, with which it began" in done.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())["self_guided"]["negatives"] == "micro_batch"
    megastar("train", config, "train.steps=6")
    for step, row in rows(expected).items():
        same = {k: v for k, v in row.items() if k.startswith(("loss", "acc", "spread", "grad_norm"))}
        assert same and same == {k: rows(run)[step][k] for k in same}, step
    refused = megastar("train", config, "train.steps=7", "self_guided.negatives=global_batch", check=False)
    assert refused.returncode == 2 and "self_guided.negatives: micro_batch -> global_batch" in refused.stderr
    (run / "config.yaml").unlink()
    refused = megastar("train", config, "train.steps=7", "self_guided.negatives=global_batch", check=False)
    assert refused.returncode == 2 and "was trained with micro_batch, which cannot change on resume" in refused.stderr
