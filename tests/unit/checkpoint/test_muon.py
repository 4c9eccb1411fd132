"""A checkpoint of a run with Muon: one momentum of the blocks' matrices, in every format that a checkpoint is converted to."""

from __future__ import annotations

import json

import pytest
import torch

from megastar import cli
from megastar.checkpoint import convert
from megastar.checkpoint.shard_format import StateReader
from megastar.errors import UserError
from megastar.model.io import load_model
from megastar.run_dir import checkpoint_dir
from tests.checkpoints import whole_of, write_checkpoint
from tests.dist.reference import config


def test_a_checkpoint_of_muon_is_converted(tmp_path, capsys):
    cfg = config(data={"shards": "codes"}, optim={"name": "muon"})
    whole, run = whole_of(cfg), tmp_path / "run"
    write_checkpoint(run, cfg, 2, 2)
    fewer = [n for n, kinds in whole.items() if kinds.keys() == {"fp32", "momentum_buffer", "ema"}]
    assert len(fewer) == 5 * 3
    convert.convert(run, "checkpoint", tmp_path / "out", data=4, tensor=1)
    found = checkpoint_dir.latest(tmp_path / "out/checkpoints")
    manifest = checkpoint_dir.read_manifest(found)
    reader = StateReader(found, manifest)
    assert manifest["optimizer"] == "muon"
    for name, kinds in whole.items():
        assert reader.kinds(name) == tuple(kinds)
        assert all(torch.equal(reader.whole(name, kind), value) for kind, value in kinds.items())
    convert.convert(run, "safetensors", tmp_path / "w.safetensors", weights="ema")
    for name, weight in load_model(tmp_path / "w.safetensors")[0].state_dict().items():
        assert torch.equal(weight, whole[f"transformer.{name}"]["ema"])
    told = convert.convert(run, "universal", tmp_path / "u")
    assert f"{len(whole)} parameters, {sum(map(len, whole.values()))} tensors read back" in told
    folder = tmp_path / "u/global_step3/zero"
    assert {p.name for p in (folder / fewer[0]).iterdir()} == {"fp32.pt", "momentum_buffer.pt", "ema.pt", "step.pt"}
    assert cli.main(["convert", str(run), "--inspect"]) == 0
    assert "of the blocks' matrices momentum_buffer" in " ".join(capsys.readouterr().out.split())
    path = found / "megastar.json"  # a reader that does not know of it would look for moments
    for wrong, sentence in (("adamw", "exp_avg/transformer.layers"), ("sgd", "optimizer")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"optimizer": wrong}))
        with pytest.raises(UserError, match=sentence):
            StateReader(found, checkpoint_dir.read_manifest(found))
