"""A checkpoint is complete or it does not count, whatever happens while it is written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from megastar.checkpoint.shard_format import KINDS, Piece, StateReader, state_file, write_pieces
from megastar.engine.checkpointer import async_saver, load, snapshot
from megastar.errors import UserError
from megastar.parallel.plan import split_of
from megastar.run_dir import checkpoint_dir
from tests.dist.test_engine import launch

SHAPES = {
    "transformer.tok_embeddings.weight": (6, 4),
    "transformer.layers.0.attention.wqkv.weight": (12, 4),
    "transformer.layers.0.attention.wo.weight": (4, 4),
    "transformer.norm.weight": (5,),
}


@pytest.mark.dist
def test_a_save_killed_anywhere_leaves_a_checkpoint_to_resume(tmp_path):
    launch(1, "tests/dist/workers/checkpoint_worker.py", str(tmp_path))
    results = json.loads((tmp_path / "kills.json").read_text())
    assert len(results) > 10 and all(r["killed"] for r in results[:-1]) and not results[-1]["killed"]
    assert {r["step"] for r in results} == {1, 2} and results[-1]["step"] == 2
    for step in (1, 2):  # whatever was interrupted, the resumed step is the same
        assert len({r["loss"] for r in results if r["step"] == step}) == 1
    assert all(".writing" not in r["left"] for r in results)


# Pieces ------------------------------------------------------------------------------------------------------------
def write(folder: Path, data: int, tensor: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """A checkpoint of SHAPES by data x tensor ranks, as the engine lays it out; returns the whole tensors."""
    torch.manual_seed(0)
    whole = {n: {k: torch.randn(s) for k in KINDS} for n, s in SHAPES.items()}
    written = folder / checkpoint_dir.WRITING / checkpoint_dir.name_of(3)
    written.mkdir(parents=True)
    files = {}
    for rank in range(data * tensor):
        pieces = []
        for name, kinds in whole.items():
            split = split_of(name) if tensor > 1 else None
            t = rank % tensor
            local = {k: (split.cut(v, tensor, t) if split else v).reshape(-1) for k, v in kinds.items()}
            size, d = local["fp32"].numel(), rank // tensor
            parts, part = (data, d) if split else (data * tensor, rank)
            low, high = size * part // parts, size * (part + 1) // parts
            piece = Piece(name, t if split else 0, low, high)
            pieces.append((piece, {k: v[low:high] for k, v in local.items()}))
        size, digest = write_pieces(written / state_file(rank), pieces)
        files[state_file(rank)] = {"bytes": size, "sha256": digest, "whose": f"rank {rank}"}
    manifest = {
        "format": checkpoint_dir.FORMAT, "step": 3, "optimizer_step": 3, "mesh": {"data": data, "tensor": tensor},
        "parameters": {n: list(s) for n, s in SHAPES.items()}, "files": files, "config": {},
    }  # fmt: skip
    checkpoint_dir.publish(folder, checkpoint_dir.name_of(3), manifest)
    return whole, manifest


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (3, 1), (1, 2), (2, 2), (1, 4)])
def test_any_mesh_reads_any_checkpoint(tmp_path, data, tensor):
    whole, _ = write(tmp_path, data, tensor)
    found = checkpoint_dir.latest(tmp_path)
    checkpoint_dir.verify(found)
    reader = StateReader(found, checkpoint_dir.read_manifest(found))
    for name, kinds in whole.items():
        for kind, value in kinds.items():
            assert torch.equal(reader.whole(name, kind), value)
            for degree in (1, 2, 4):
                split = split_of(name) if degree > 1 else None
                for rank in range(degree):
                    flat = (split.cut(value, degree, rank) if split else value).reshape(-1)
                    got = reader.range(name, kind, degree, rank, 1, len(flat) - 1)
                    assert torch.equal(got, flat[1:-1])


def test_a_missing_or_damaged_part_is_named(tmp_path):
    write(tmp_path, 2, 2)
    found = checkpoint_dir.latest(tmp_path)
    manifest = checkpoint_dir.read_manifest(found)
    for name in [*manifest["files"]]:
        good = (found / name).read_bytes()
        for place in (4, len(good) // 2, len(good) - 1):  # in the header, in the middle, at the end
            bad = bytearray(good)
            bad[place] ^= 1
            (found / name).write_bytes(bad)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                checkpoint_dir.verify(found)
        (found / name).write_bytes(good)
    (found / state_file(1)).rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"lacks state-00001.safetensors \(rank 1\)"):
        checkpoint_dir.read_manifest(found)
    with pytest.raises(UserError, match="state-00001.safetensors is missing: restore it"):
        StateReader(found, manifest)
    less = {k: v for k, v in manifest["files"].items() if k != state_file(1)}
    with pytest.raises(
        UserError, match=r"no file holds elements 6 and above of the 24 of transformer.tok_embeddings.weight"
    ):
        StateReader(found, manifest | {"files": less})
    (found / state_file(1)).write_bytes(b"junk")
    with pytest.raises(UserError, match="state-00001.safetensors is damaged"):
        StateReader(found, manifest)


# The thread that writes --------------------------------------------------------------------------------------------
class Student:
    """What ``Saver`` asks of the engine, at stage 0 in one process."""

    module = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.arange(4.0))})

    def zero_optimization_stage(self) -> int:
        return 0


def saver_for(folder: Path) -> async_saver.Saver:
    from megastar.config.schema import RunConfig
    from megastar.engine.context import Context
    from megastar.engine.zero.engines import Engines
    from megastar.engine.zero.partitions import AdamWEMA

    Student.optimizer = optimizer = AdamWEMA(Student.module.values(), lr=0.1)
    engines = Engines(Student(), None, optimizer, 1, 1)
    return async_saver.Saver(RunConfig(run=str(folder)), Context(0, 1, torch.device("cpu"), torch.float32), engines)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    save, gate = saver_for(tmp_path), threading.Event()
    original = snapshot.write_pieces

    def slow(*arguments):
        assert gate.wait(20)
        return original(*arguments)

    monkeypatch.setattr(snapshot, "write_pieces", slow)
    save.save(5, {})
    with torch.no_grad():
        Student.module["a"].fill_(-1.0)  # the next step
    assert checkpoint_dir.latest(tmp_path / "checkpoints") is None
    gate.set()
    done = save.finish()
    reader = StateReader(done, checkpoint_dir.read_manifest(done))
    assert reader.whole("a", "fp32").tolist() == [0.0, 1.0, 2.0, 3.0]  # of the moment of the save


def test_a_checkpoint_is_not_published_before_rank_0_sees_its_files(tmp_path, monkeypatch):
    """They may be on another node's own disk: older checkpoints must stay."""
    save, original = saver_for(tmp_path), snapshot.write_pieces
    save.save(5, {})
    good = save.finish()
    hidden = tmp_path / "elsewhere"

    def elsewhere(path, pieces):
        found = original(path, pieces)
        path.rename(hidden)
        return found

    monkeypatch.setattr(snapshot, "write_pieces", elsewhere)
    monkeypatch.setattr(async_saver, "VISIBLE_WITHIN", 0.5)
    save.save(6, {})
    assert save.finish() == good and checkpoint_dir.latest(tmp_path / "checkpoints") == good
    assert (
        "state-00000.safetensors of rank 0: data rank 0, tensor rank 0 is missing on the node of rank 0" in save.problem
    )
    assert "the run folder must be the same folder on all nodes" in save.problem

    def late(path, pieces):
        found = original(path, pieces)
        path.rename(hidden)
        threading.Timer(1.0, lambda: hidden.rename(path)).start()
        return found

    monkeypatch.setattr(snapshot, "write_pieces", late)
    monkeypatch.setattr(async_saver, "VISIBLE_WITHIN", 20.0)
    save.save(7, {})
    assert save.finish() == checkpoint_dir.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints/step-00000007"


def test_another_network_is_refused():
    with pytest.raises(UserError, match=r"norm.weight is \[4\] there, \[8\] in this configuration"):
        load._same_network({"norm.weight": [4]}, {"norm.weight": [8]}, Path("runs/x"))
    with pytest.raises(UserError, match="projector.w1.weight is absent there"):
        load._same_network({}, {"projector.w1.weight": [8]}, Path("runs/x"))
