"""`megastar convert`: every output holds the very bits of the checkpoint, and every mistake has its sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from megastar import cli
from megastar.checkpoint import atomic_output, convert
from megastar.checkpoint.llamagen_writer import how_to_load
from megastar.checkpoint.rng_state import random_file
from megastar.checkpoint.safetensors_stream import TensorWriter
from megastar.checkpoint.shard_format import KINDS, StateReader
from megastar.errors import UserError
from megastar.model.io import load_model
from megastar.parallel.mesh import Mesh
from megastar.run_dir import checkpoint_dir
from megastar.utils.files import sha256
from tests.checkpoints import full_weights, save_model, shapes_of, whole_of, write_checkpoint
from tests.dist.reference import config

ROOT = Path(__file__).resolve().parents[3]
CFG = config(data={"shards": "codes"})
OBJECTIVE = {
    "views": 2, "student_views": 2, "mask_ratio": 0.25, "alpha": 1.0, "beta": 0.5, "contrastive_block": 2, "positions": 4,
    "step_loss": True, "view_loss": True, "teacher_decay": 0.9,
}  # fmt: skip
WHOLE = whole_of(CFG)
LLAMAGEN = {  # autoregressive/models/gpt.py: what its Transformer's state_dict holds
    "cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight",
    *(f"layers.{i}.{name}.weight" for i in range(3) for name in (
        "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm",
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for data, tensor in ((1, 1), (2, 2), (4, 1), (3, 2)):
        write_checkpoint(folder / f"{data}x{tensor}", CFG, data, tensor)
    return folder


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(runs / "2x2", tmp_path / "run"))


def step_of(run: Path) -> Path:
    return checkpoint_dir.find_checkpoint(run)


def weights_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {n.removeprefix("transformer."): t[kind].to(dtype) for n, t in WHOLE.items() if n.startswith("transformer.")}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def nothing_left(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if "writing" in p.name or p.name.endswith(".tmp")]


# Weights files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mesh", ["1x1", "2x2", "4x1", "3x2"])
@pytest.mark.parametrize(("weights", "dtype"), [("ema", "fp32"), ("student", "bf16"), ("ema", "fp16")])
def test_safetensors_hold_the_weights(runs, tmp_path, mesh, weights, dtype):
    out = tmp_path / "deep" / "w.safetensors"
    told = convert.convert(runs / mesh, "safetensors", out, weights=weights, dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model, about = load_model(out, dtype=kind)
    assert equal(model.state_dict(), weights_of("ema" if weights == "ema" else "fp32", kind))
    assert about == {
        "weights": weights, "step": 3, "of_steps": 8, "images_seen": 24, "seed": 0, "method": "star",
        "self_guided": True, "objective": OBJECTIVE, "classes": list("abcde"), "command": "megastar train",
    }  # fmt: skip
    assert f"{weights} weights, {dtype}, step 3" in told and "read back as written" in told
    assert sorted(p.name for p in out.parent.iterdir()) == ["w.json", "w.safetensors"]
    beside = json.loads((out.parent / "w.json").read_text())
    assert beside["sha256"] == sha256(out) and beside["step"] == 3 and beside["model"]["dim"] == 16


def test_the_streamed_file_is_the_one_that_save_model_writes(runs, tmp_path):
    convert.convert(runs / "2x2", "safetensors", tmp_path / "a.safetensors")
    model, about = load_model(tmp_path / "a.safetensors")
    weights = full_weights(step_of(runs / "2x2"), "ema")
    assert equal(weights, weights_of("ema"))
    save_model(tmp_path / "b.safetensors", weights, model.cfg, about)
    other, provenance = load_model(tmp_path / "b.safetensors")
    assert equal(model.state_dict(), other.state_dict()) and other.cfg == model.cfg == CFG.model and provenance == about


@pytest.mark.parametrize(("weights", "dtype"), [("ema", "fp32"), ("student", "bf16"), ("ema", "fp16")])
def test_llamagen_loads_its_layout(runs, tmp_path, weights, dtype):
    out = tmp_path / "w.pt"
    told = convert.convert(runs / "2x2", "llamagen", out, weights=weights, dtype=dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    loaded = torch.load(out, map_location="cpu", weights_only=True)  # sample_c2i.py's line, as torch's default is now
    assert loaded.keys() == {"model", "megastar"} and set(loaded["model"]) == LLAMAGEN
    assert equal(loaded["model"], weights_of("ema" if weights == "ema" else "fp32", kind))
    assert loaded["megastar"]["step"] == 3
    mapped = torch.load(out, weights_only=True, mmap=True)["model"]
    assert equal(mapped, loaded["model"]) and all(t.data_ptr() % 64 == 0 for t in mapped.values())
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    assert "Transformer(ModelArgs(n_layer=3, n_head=2, dim=16, multiple_of=16," in told


def test_llamagens_names_for_its_sizes():
    b = config(model={"n_layer": 12, "n_head": 12, "dim": 768, "multiple_of": 256, "image_tokens": 256}).model
    assert how_to_load(b) == "--gpt-model GPT-B --codebook-size 32 --num-classes 5 --image-size 256"
    b.norm_eps = 1e-6
    assert how_to_load(b).startswith("no named size: Transformer(")


def test_fp16_refuses_what_it_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.checkpoints.draw", lambda name, kind, shape: torch.full(shape, 7e4))
    run = write_checkpoint(tmp_path / "run", CFG, 1, 1)
    with pytest.raises(UserError, match=r"weight reaches 7e\+04, beyond fp16's 65504: use --dtype bf16"):
        convert.convert(run, "llamagen", tmp_path / "w.pt", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


# Checkpoints -------------------------------------------------------------------------------------------------------
def test_universal_holds_every_tensor(runs, tmp_path):
    out = tmp_path / "u"
    told = convert.convert(runs / "2x2", "universal", out)
    tag = (out / "latest_universal").read_text()
    assert tag == "global_step3" and f"{len(WHOLE)} parameters x 4 tensors read back and equal" in told
    for name, kinds in WHOLE.items():
        folder = out / tag / "zero" / name
        assert {p.name for p in folder.iterdir()} == {f"{k}.pt" for k in (*KINDS, "step")}
        for kind, value in kinds.items():
            assert torch.equal(torch.load(folder / f"{kind}.pt", weights_only=True)["param"], value)
        assert torch.load(folder / "step.pt", weights_only=True) == 3
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
        states = torch.load(out / tag / f"{name}_model_states.pt", weights_only=True)
        assert states["global_steps"] == 3 and states["megastar"]["steps"] == 8


def test_resliced_round_trip(runs, tmp_path):
    source = runs / "2x2"
    for data, tensor in ((4, 1), (1, 2), (8, 2)):
        out = tmp_path / f"{data}x{tensor}"
        told = convert.convert(source, "checkpoint", out, data=data, tensor=tensor)
        assert f"checkpoint for {data} data x {tensor} tensor ranks" in told and f"{data * tensor} files" in told
        found = checkpoint_dir.latest(out / "checkpoints")
        about = checkpoint_dir.read_manifest(found)
        checkpoint_dir.verify(found)
        assert about["mesh"] == {"data": data, "tensor": tensor, "zero_stage": 3}
        assert about["config"]["parallel"]["tensor_parallel"] == tensor
        assert sum(n.startswith("state-") for n in about["files"]) == data * tensor
        reader = StateReader(found, about)
        assert all(torch.equal(reader.whole(n, k), v) for n, kinds in WHOLE.items() for k, v in kinds.items())
        source = out
    convert.convert(source, "safetensors", tmp_path / "w.safetensors")
    assert equal(load_model(tmp_path / "w.safetensors")[0].state_dict(), weights_of("ema"))
    assert nothing_left(tmp_path)


def test_a_rank_of_a_resliced_checkpoint_reads_its_own_files(runs, tmp_path):
    """ZeRO-3's part of a split weight lies in the rank's own file, of another in its tensor group's."""
    convert.convert(runs / "4x1", "checkpoint", tmp_path / "out", data=2, tensor=2)
    found = step_of(tmp_path / "out")
    about = checkpoint_dir.read_manifest(found)
    for rank in range(4):
        mesh = Mesh(4, 2, rank)
        reader = StateReader(found, about)
        for name in reader.shapes:
            size = torch.Size(reader.local_shape(name, 2)).numel()
            part = -(-size // 2)
            low, high = (min(size, part * d) for d in (mesh.data_rank, mesh.data_rank + 1))
            reader.range(name, "fp32", 2, mesh.tensor_rank, low, high)
            if name.endswith("wqkv.weight"):
                assert set(reader.handles) <= {f"state-{r:05d}.safetensors" for r in range(4) if r // 2 == rank // 2}
        group = [f"state-{2 * mesh.data_rank + t:05d}.safetensors" for t in (0, 1)]
        assert set(reader.handles) == set(group)


def test_random_states_are_those_of_a_resumed_run(runs, tmp_path):
    convert.convert(runs / "2x2", "checkpoint", tmp_path / "same", data=2, tensor=1)
    convert.convert(runs / "2x2", "checkpoint", tmp_path / "other", data=4)
    before = torch.get_rng_state()
    for d in range(2):
        name = random_file(d)
        assert (step_of(tmp_path / "same") / name).read_bytes() == (step_of(runs / "2x2") / name).read_bytes()
    for d in range(4):
        state = torch.load(step_of(tmp_path / "other") / random_file(d), weights_only=True)
        seed = (CFG.train.seed * 1_000_003 + 3) * 100_003 + d
        assert torch.equal(state["torch"], torch.Generator().manual_seed(seed).get_state())
        assert state["cuda"].view(torch.int64).tolist() == [seed, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_more_ranks_than_open_files(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("megastar.checkpoint.reshard.OPEN_FILES", 3)
    monkeypatch.setattr("megastar.checkpoint.shard_format.OPEN_FILES", 2)
    convert.convert(runs / "4x1", "checkpoint", tmp_path / "out", data=8, tensor=1)
    assert equal(full_weights(step_of(tmp_path / "out"), "student"), weights_of("fp32"))


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000003"])
def test_a_source_is_a_run_its_checkpoints_or_one_of_them(runs, tmp_path, place):
    assert convert.convert(runs / "1x1" / place, "llamagen", tmp_path / "w.pt").startswith(f"{tmp_path / 'w.pt'}: ema")


# Mistakes ----------------------------------------------------------------------------------------------------------
def refused(words: list, capsys) -> str:
    assert cli.main(["convert", *map(str, words)]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("megastar: error: ") and out.err.count("\n") == 1, out.err
    return out.err


def test_a_missing_or_damaged_file_is_named(run, tmp_path, capsys):
    file = step_of(run) / "state-00002.safetensors"
    good = file.read_bytes()
    words = [run, "--to", "safetensors", "--out", tmp_path / "w.safetensors"]
    file.write_bytes(good[:-9] + b"x" + good[-8:])
    assert "state-00002.safetensors is damaged: its SHA-256 differs from the manifest's: restore it" in refused(
        words, capsys
    )
    file.write_bytes(good[:-1])
    assert f"has {len(good) - 1} bytes, its manifest records {len(good)}" in refused(words, capsys)
    file.unlink()
    assert "lacks state-00002.safetensors (rank 2: data rank 1, tensor rank 0): restore it" in refused(words, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_another_format_or_network_is_told(run, tmp_path, capsys):
    path = step_of(run) / checkpoint_dir.MANIFEST
    about = json.loads(path.read_text())
    words = [run, "--to", "llamagen", "--out", tmp_path / "w.pt"]
    path.write_text(json.dumps(about | {"format": 1}))
    assert "has format 1, this megastar reads 2: use the version that wrote it" in refused(words, capsys)
    about["config"]["model"]["n_layer"] = 4
    path.write_text(json.dumps(about))
    assert "have a different architecture: n_layer 3, not 4" in refused(words, capsys)


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        (["--data", "2", "--tensor", "4"], "tensor parallel degree 4: must divide 2 heads, the ffn width 48 and 32 codes; use 1 or 2"),
        (["--data", "3"], "--data 3 does not divide train.global_batch 8, which a resumed run keeps: use 1, 2, 4 or 8"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_reached(runs, tmp_path, capsys, mesh, sentence):
    assert sentence in refused([runs / "1x1", "--to", "checkpoint", "--out", tmp_path / "x", *mesh], capsys)


@pytest.mark.parametrize("to", convert.TARGETS)
def test_too_little_disk_is_told_before_the_first_byte(runs, tmp_path, monkeypatch, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    with pytest.raises(
        UserError, match=r"out needs [\d.]+ MB and .* has \S+ \S+ free: free space or choose another path"
    ):
        convert.convert(runs / "1x1", to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", convert.TARGETS)
def test_an_existing_output_stays_unless_forced(runs, tmp_path, to):
    out = tmp_path / "out"
    convert.convert(runs / "1x1", to, out)
    before = sorted((p, p.stat().st_ino) for p in [out, *out.rglob("*")])
    with pytest.raises(UserError, match=r"out exists: choose another path, or pass --force to replace it"):
        convert.convert(runs / "2x2", to, out)
    assert before == sorted((p, p.stat().st_ino) for p in [out, *out.rglob("*")])
    convert.convert(runs / "2x2", to, out, force=True)
    assert before != sorted((p, p.stat().st_ino) for p in [out, *out.rglob("*")]) and nothing_left(tmp_path)


def test_force_removes_only_what_a_conversion_wrote(runs, run, tmp_path, capsys):
    (run / "metrics.jsonl").write_text("{}\n")
    words = ["--to", "checkpoint", "--data", "1", "--force", "--out"]
    told = refused([runs / "1x1", *words, run], capsys)
    assert "run also contains metrics.jsonl, which --force would remove: choose another path" in told
    assert f"--out {run} would overwrite the input {run}: name another" in refused([run, *words, run], capsys)
    assert "run is a folder: name the file to write" in refused(
        [runs / "1x1", "--to", "llamagen", "--out", run], capsys
    )
    told = refused([runs / "1x1", "--to", "universal", "--out", run / "metrics.jsonl"], capsys)
    assert "metrics.jsonl is not a folder: name another place" in told
    told = refused([runs / "1x1", "--to", "universal", "--out", run / "metrics.jsonl" / "deep"], capsys)
    assert f"{run / 'metrics.jsonl'} is not a folder: name another place" in told


@pytest.mark.parametrize("to", convert.TARGETS)
def test_a_failure_on_the_way_leaves_nothing(runs, tmp_path, monkeypatch, to):
    out, original, calls = tmp_path / "out", StateReader.whole, []

    def whole(self, name, kind):
        calls.append(name)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        return original(self, name, kind)

    monkeypatch.setattr(StateReader, "whole", whole)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(runs / "2x2", to, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "size"), [*((to, 3000) for to in convert.TARGETS), ("universal", 4500)])
def test_what_reads_back_otherwise_is_refused(runs, tmp_path, monkeypatch, to, size):
    """A disk that loses a bit after the write: nothing appears."""
    original, hit = atomic_output.settle, []

    def settle(path):
        original(path)
        if path.stat().st_size > size and "random" not in path.name and not hit:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            hit.append(path)

    for module in ("convert_weights", "deepspeed_universal", "reshard"):
        monkeypatch.setattr(f"megastar.checkpoint.{module}.settle", settle)
    with pytest.raises(UserError, match=r"differs from what was written|is damaged"):
        convert.convert(runs / "2x2", to, tmp_path / "out")
    assert hit and not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_removed(runs, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    import socket

    for pid in (ended.pid, f"{ended.pid}.tmp", 1, "1.tmp"):
        (tmp_path / f".w.pt.writing-{socket.gethostname()}-{pid}").write_bytes(b"half")
    convert.convert(runs / "1x1", "llamagen", tmp_path / "w.pt")
    left = {p.name.rpartition("-")[2] for p in tmp_path.iterdir()}
    assert left == {"w.pt", "1", "1.tmp"}  # process 1 runs: what it writes stays


# Inspection --------------------------------------------------------------------------------------------------------
def test_inspect_tells_what_is_there(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["convert", "--inspect", str(run), "--verify"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    count = sum(torch.Size(s).numel() for n, s in shapes_of(CFG).items() if n.startswith("transformer."))
    for words in ("3 of 8", "3 blocks, 2 heads, width 16", "2 data x 2 tensor ranks, ZeRO stage 3", f"{count:,} transformer",
                  "complete: names and sizes match, SHA-256 too", "rank 3: data rank 1, tensor rank 1", "ok (SHA-256)", "random-00001.pt"):  # fmt: skip
        assert words in text, words
    file = step_of(run) / "state-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert cli.main(["convert", "--inspect", str(run)]) == 0  # sizes are right
    assert "--verify compares hashes too" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["convert", "--inspect", str(run), "--verify"]) == 1
    assert "SHA-256 differs" in capsys.readouterr().out
    file.unlink()
    assert cli.main(["convert", "--inspect", str(run)]) == 1
    assert "missing" in capsys.readouterr().out


# Parts -------------------------------------------------------------------------------------------------------------
def test_convert_needs_no_deepspeed():
    code = (
        "import sys, megastar.checkpoint.convert, megastar.checkpoint.inspect\n"
        "assert 'deepspeed' not in sys.modules, 'it takes seconds to import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_a_writer_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path / "x", {"w": (torch.float32, (2,))}, {}):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_stays_below_a_few_tensors(tmp_path):
    from benchmarks.convert import LIMIT_GIB, measure

    for row in measure(tmp_path):
        assert row["peak_gib"] <= LIMIT_GIB, row
