"""A run that is really sick is warned, by itself, by `megastar status` and on the page of `megastar report`."""

from __future__ import annotations

from megastar import cli
from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from tests.integration.conftest import megastar


def test_a_masked_image_loss_with_nothing_to_learn(world, tmp_path):
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "sick.yaml", run)
    still = [f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")]  # dropout alone keeps the two apart
    done = megastar("train", config, "self_guided.mask_ratio=0", "self_guided.teacher_decay=0", *still)
    told = [e for e in read_events(run) if e["event"] == "warning"]
    assert [(e["step"], e["about"]) for e in told] == [(10, "trivial_mim")]
    assert "raise self_guided.mask_ratio (now 0) or teacher_decay (now 0), or set alpha=0" in told[0]["text"]
    assert "the MIM loss is trivially small" in done.stdout
    assert any("trivially small" in line for line in status_of(run).health)
    assert cli.main(["report", str(run), "--no-samples", "--no-attention"]) == 0
    assert "trivially small" in (run / "report.html").read_text()
