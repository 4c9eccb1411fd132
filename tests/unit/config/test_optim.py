"""The optimizer's section: the comparison of both optimizers, and what its tool reads from the runs."""

from __future__ import annotations

import json

import pytest

from benchmarks.optimizer import images_to_loss
from megastar.config.load import load_compare_config, override_config, save_config


def test_the_comparison_of_optimizers_changes_nothing_else():
    cfg = load_compare_config("configs/compare/muon_emoji.yaml")
    own = ["run=r", "data.shards=s"]  # set by the comparison
    runs = {name: override_config(cfg.base, [*own, *v.overrides], name) for name, v in cfg.variants.items()}
    assert {name: r.optim.name for name, r in runs.items()} == {
        "ar": "adamw", "ar_muon": "muon", "star": "adamw", "star_muon": "muon",
    }  # fmt: skip
    for method in ("ar", "star"):
        runs[method].optim.name = "muon"
        assert runs[method] == runs[f"{method}_muon"]


def test_images_to_a_loss(tmp_path, monkeypatch, capsys):
    base = load_compare_config("configs/compare/muon_emoji.yaml").base
    base.run, base.data.shards = "r", "s"
    for name, losses in {"ar": [5.0, 4.0, 3.0], "ar_muon": [4.0, 2.0, 1.0]}.items():
        run = tmp_path / f"runs/{name}-seed0"
        run.mkdir(parents=True)
        save_config(base, run / "config.yaml")
        rows = [{"step": 25 * (i + 1), "val_loss_ar": loss} for i, loss in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["images_to_loss", str(tmp_path), "ar:ar_muon"])
    images_to_loss.main()
    out = capsys.readouterr().out
    assert "ar ends at 3.0000; ar_muon: 1,200 images, 0.500 of 2,400; ends at 1.0000" in out
    assert images_to_loss.steps_to([(25, 4.0)], 3.0) is None
    with pytest.raises(SystemExit, match="holds no run of star"):
        images_to_loss.seeds_of(tmp_path, "star")
