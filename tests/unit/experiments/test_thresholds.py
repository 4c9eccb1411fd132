"""`base.eval.thresholds` of a comparison."""

from __future__ import annotations

from megastar.cli import main
from megastar.experiments.plan import check_thresholds, plan_runs
from tests.unit.experiments.test_compare import small


def test_thresholds_need_scores(tmp_path, capsys):
    wanted = ["base.eval.thresholds=[50.0]", "base.data.tokenizer=t.safetensors"]
    small(tmp_path)
    assert main(["compare", str(tmp_path / "compare.yaml"), *wanted, "--dry-run"]) == 2
    assert "base.eval.thresholds = [50.0]: no score is compared with them" in " ".join(capsys.readouterr().err.split())
    cfg = small(tmp_path, *wanted, "base.eval.every=4")
    check_thresholds(cfg)
    assert all(run.cfg.eval.thresholds == [50.0] for run in plan_runs(cfg, 0))
