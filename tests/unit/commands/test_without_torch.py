"""Commands that read only: they run where importing torch or deepspeed fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megastar.checkpoint.hub.convert_to import to_hub_folder
from megastar.config.load import save_config
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config
from tests.unit.data.shards.test_shards import write_set

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_TORCH = """
import sys
sys.modules |= {"torch": None, "deepspeed": None}  # importing them raises
from megastar.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    cfg = config(data={"shards": "codes"})
    write_checkpoint(run, cfg, 2, 2)
    save_config(cfg, run / "config.yaml")
    rows = [{"step": step, "loss": 3.0 - step, "step_s": 0.5, "images_per_s": 16.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def output(*words: object) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status(run):
    assert "step 3" in output("status", run)
    status = json.loads(output("status", run, "--json"))
    assert (status["step"], status["checkpoint_step"], status["loss"], status["step_s"]) == (3, 3, 1.0, 0.5)


def test_plan():
    text = output("plan", "b", "--gpus", 8)
    assert "110.9 M parameters" in text and "recommended: " in text
    assert json.loads(output("plan", "b", "--json"))["recommended"]["fits"]


def test_convert_inspect(run):
    text = output("convert", "--inspect", run, "--verify")
    assert "3 blocks, 2 heads, width 16" in text and "2 data x 2 tensor ranks" in text
    assert "complete: names and sizes match, SHA-256 too" in text


def test_convert_inspect_of_a_folder_in_the_hubs_layout(tmp_path):
    assets = ROOT / "assets"
    tokenizer = assets / "tokenizer/emoji64-vq.safetensors"
    to_hub_folder(assets / "weights/demo-nano.safetensors", tmp_path / "hf", "nano", tokenizer=tokenizer)
    text = output("convert", "--inspect", tmp_path / "hf", "--verify")
    assert '"n_layer": 6' in text and "complete: SHA-256 matches (weights and tokenizer)" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights/demo-nano", ('"n_layer": 6', '"provenance"')),
        ("tokenizer/emoji64-vq", ('"codebook_size": 2048', '"provenance"')),
    ],
)
def test_convert_inspect_of_a_weights_file(name, words):
    text = output("convert", "--inspect", ROOT / "assets" / f"{name}.safetensors")
    assert '"parameters": ' in text and all(word in text for word in words)


def test_data_inspect(tmp_path):
    text = output("data", "inspect", write_set(tmp_path / "set"))
    assert "a/picture.1  class 1 b" in text and "center-flip" in text
    assert json.loads(output("data", "inspect", tmp_path / "set", "--json"))["samples"] == 9


def test_report_without_samples_and_attention(run, tmp_path):
    page = tmp_path / "report.html"
    assert str(page) in output("report", run, "--no-samples", "--no-attention", "--out", page)
    assert page.read_text().startswith("<!doctype html>") and "loss" in page.read_text()
