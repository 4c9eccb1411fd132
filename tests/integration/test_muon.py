"""`megastar train` with Muon: resumed on another mesh, and never with another optimizer."""

from __future__ import annotations

import json

import pytest
import torch

from megastar.run_dir.layout import CONFIG, METRICS
from tests.checkpoints import full_weights
from tests.integration.conftest import megastar

STILL = [f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")]  # it is drawn for each data rank


def test_a_run_with_muon_goes_on_elsewhere_but_not_with_adamw(world, tmp_path):
    runs = {name: tmp_path / name for name in ("one", "other")}
    for name, run in runs.items():
        config = world.write_config(tmp_path / f"{name}.yaml", run, steps=12 if name == "one" else 8)
        one = megastar("train", config, "optim.name=muon", "parallel.deepspeed=zero1", *STILL)
        assert "AdamW's size" not in one.stdout + one.stderr
    words = ["train.steps=12", "parallel.deepspeed=zero3", "parallel.tensor_parallel=2", *STILL]
    refused = megastar("train", config, *words, "optim.name=adamw", ranks=2, check=False)
    assert refused.returncode == 2 and "optim.name: muon -> adamw" in refused.stderr
    (runs["other"] / CONFIG).rename(tmp_path / "away")  # then the checkpoint itself refuses
    refused = megastar("train", config, *words, "optim.name=adamw", ranks=2, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "step-00000008 was trained with optim.name = muon, this configuration sets adamw" in refused.stderr
    (tmp_path / "away").rename(runs["other"] / CONFIG)
    megastar("train", config, *words, "optim.name=muon", "optim.muon.lr=0.02", ranks=2)
    rows = {name: [json.loads(line) for line in (run / METRICS).read_text().splitlines()] for name, run in runs.items()}
    last = {name: next(r for r in reversed(some) if "loss" in r) for name, some in rows.items()}
    assert last["one"]["lr_muon"] == last["other"]["lr_muon"] == 0.02 and last["one"]["lr"] == 0.003
    assert last["other"]["loss"] == pytest.approx(last["one"]["loss"], rel=1e-5)
    for kind in ("student", "ema"):
        a, b = (full_weights(run / "checkpoints/step-00000012", kind) for run in runs.values())
        assert all(torch.dist(a[k], b[k]) <= 1e-5 * a[k].norm() for k in a)
    megastar("convert", runs["other"], "--to", "safetensors", "--out", tmp_path / "w.safetensors")
    warned = megastar("train", config, *words, "optim.name=muon", "optim.muon.lr=1e-4", "train.steps=13", ranks=2)
    assert "optim.muon.lr gives a peak rate of 0.0001, which is of AdamW's size" in warned.stdout + warned.stderr
