"""`megastar compare` end to end: interrupted, continued, repeated, redrawn."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megastar.cli import main
from megastar.experiments.job_queue import last_step
from megastar.run_dir.checkpoint_dir import latest
from tests.checkpoints import full_weights
from tests.integration.conftest import ROOT, environment

pytestmark = [pytest.mark.dist, pytest.mark.long]
STEPS = 40


def write_comparison(world, folder: Path) -> Path:
    """Two variants, two seeds, fp32; scores use the validation images."""
    base = yaml.safe_load(world.write_config(folder / "run.yaml", folder / "run").read_text())
    for size in ("vocab_size", "num_classes", "image_tokens"):
        del base["model"][size]  # of the codes
    base["run"] = ""  # the comparison sets it
    base["train"] |= {"steps": STEPS, "save_every": 20, "val_every": STEPS}
    file = folder / "compare.yaml"
    fields = {
        "out": str(folder / "out"), "pictures": str(world.pictures), "codes": str(world.folder / "codes"),
        "seeds": [0, 1], "weights": ["ema"], "jobs": 2,
        "variants": {"ar": {"label": "AR", "overrides": ["self_guided.enabled=false"]}, "star": {"label": "ST-AR"}},
        "probe": {"score_on": "val", "block": 1, "positions": 4, "epochs": 3, "optimizer": "sgd"},
        "sample": {"count": 12}, "score": {"against": ["val"]}, "curve": {"every": 20, "count": 8}, "base": base,
    }  # fmt: skip
    file.write_text(yaml.safe_dump(fields))
    return file


def interrupt(config: Path, out: Path) -> int:
    """Start a comparison and stop it while the first runs train. Returns the exit status."""
    with (out.parent / "first.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megastar", "compare", str(config)], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )  # fmt: skip
    deadline = time.monotonic() + 900
    try:
        while not any(last_step(f) > 1 for f in out.glob("runs/*/metrics.jsonl")):
            assert time.monotonic() < deadline and process.poll() is None, (out.parent / "first.log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=600)
    finally:
        if process.poll() is None:
            process.kill()


def test_a_comparison_is_interrupted_continued_and_finished(world, tmp_path, capsys):
    config, out = write_comparison(world, tmp_path), tmp_path / "out"
    assert interrupt(config, out) == 128 + signal.SIGTERM, (tmp_path / "first.log").read_text()
    done = {f.parent.name: last_step(f) for f in out.glob("runs/*/metrics.jsonl")}
    assert done and max(done.values()) < STEPS, "the runs ended before the signal: the test proves nothing"
    saved = [latest(out / "runs" / name / "checkpoints") for name in done]
    assert any(saved), "a started run saves when it is stopped"
    sizes = (
        f"model.vocab_size = 64, model.num_classes = 3, model.image_tokens = 16, from the manifest of {world.folder}"
    )
    assert sizes in " ".join((tmp_path / "first.log").read_text().split())
    assert yaml.safe_load((out / "compare.yaml").read_text())["base"]["model"]["num_classes"] == 3

    assert main(["compare", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "mean ± standard deviation" in printed and "table.md:" in printed
    results = json.loads((out / "results.json").read_text())
    assert sorted(results["runs"]) == ["ar-seed0", "ar-seed1", "star-seed0", "star-seed1"] and not results["failed"]
    for name, row in results["runs"].items():
        assert row["done"] == STEPS and row["train_cpu_s"] > 0 and row["val_loss_ar"] > 0
        steps = [json.loads(line)["step"] for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert len(row["weights"]["ema"]["probe"]["accuracy"]) == 4 and sorted(row["curve"]) == ["20", "40"]
        assert row["weights"]["ema"]["score"]["val"]["scores"]["FD-EffLite0"] > 0
    rows = results["runs"]
    assert rows["ar-seed0"]["order_sha256"] == rows["star-seed0"]["order_sha256"] != rows["ar-seed1"]["order_sha256"]
    assert rows["star-seed0"]["sequences"] == 2 * rows["ar-seed0"]["sequences"]
    pair = results["summary"]["differences"]["ema"]["star - ar"]["probe, last position (%)"]
    assert pair["n"] == 2 and (out / "probe.png").is_file() and (out / "score.png").is_file()
    assert "| ST-AR | 2/2 |" in (out / "table.md").read_text()
    ends = {n: full_weights(out / "runs" / n / "checkpoints" / f"step-{STEPS:08d}", "student") for n in rows}
    assert not any(torch.equal(ends["ar-seed0"][k], ends["star-seed0"][k]) for k in ends["ar-seed0"] if "wqkv" in k)

    # A third call starts nothing: all results are stored.
    before = {f: f.stat().st_mtime_ns for folder in ("runs", "evaluation", "logs") for f in (out / folder).rglob("*")}
    assert main(["compare", str(config)]) == 0
    assert before == {
        f: f.stat().st_mtime_ns for folder in ("runs", "evaluation", "logs") for f in (out / folder).rglob("*")
    }
    assert ": train" not in capsys.readouterr().out.split("mean ±")[0]  # no job

    # Other settings for the same folder are rejected before anything is written.
    assert main(["compare", str(config), "base.optim.lr=0.1"]) == 2
    assert "contains a run with another configuration (optim.lr: 0.003 -> 0.1)" in capsys.readouterr().err

    # Tables and figures need only results.json and compare.yaml.
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("results.json", "compare.yaml"):
        shutil.copy(out / name, moved / name)
    assert main(["compare", "--redraw", str(moved)]) == 0
    assert (moved / "table.md").read_text() == (out / "table.md").read_text() and (moved / "probe.png").is_file()
