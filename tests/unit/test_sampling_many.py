"""Many pictures by many processes: the same bytes whoever draws them, whoever dies, however often it is begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megastar import cli
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import save_model
from megastar.model.transformer import Transformer
from megastar.sampling import claims, distributed
from megastar.sampling.claims import Claims
from megastar.sampling.distributed import Painter, iterate_images, open_folder, part_of, plan_labels, sample_folder
from megastar.sampling.npz import read_npz, save_npz
from megastar.sampling.request import Options
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel

ROOT = Path(__file__).resolve().parents[2]
CFG = ModelConfig(name="t", n_layer=2, n_head=2, dim=16, multiple_of=8, vocab_size=23, num_classes=4, image_tokens=16)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(scope="module")
def networks() -> tuple[Transformer, VQModel]:
    torch.manual_seed(0)
    model = Transformer(CFG)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval(), VQModel(TokenizerConfig(16, 8, [1, 1, 1], 1, 8, 23, 4, norm_groups=4)).eval()


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    save_model(folder / "w.safetensors", networks[0].state_dict(), CFG, {"step": 1, "classes": list("abcd")})
    save_tokenizer(networks[1], folder / "t.safetensors", {})
    return folder / "w.safetensors", folder / "t.safetensors"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def painter(networks, count=10, **changes) -> Painter:
    known = {"batch": 3, "options": Options(cfg_scale=2.0)} | changes
    return Painter(*networks, plan_labels("balanced", count, [0, 1, 2, 3], 0), **known)


def words(files, *more) -> list[str]:
    return ["sample", str(files[0]), "--tokenizer", str(files[1]), *map(str, more)]


def start(rank: int, world: int, arguments: list[str]) -> subprocess.Popen:
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megastar", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


# Plans -------------------------------------------------------------------------------------------------------
def test_class_plans():
    assert plan_labels("balanced", 7, [3, 1], 0) == [3, 1, 3, 1, 3, 1, 3]
    drawn = plan_labels("random", 4000, list(range(10)), 5)
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 30 and len(counts) == 10  # chi-squared, 9 degrees of freedom
    assert (
        drawn[:100] == plan_labels("random", 100, list(range(10)), 5) != plan_labels("random", 100, list(range(10)), 6)
    )


# Parts and processes -----------------------------------------------------------------------------------------
def test_ranks_share_the_pictures_while_they_are_drawn(networks, tmp_path):
    whole = dict(item for n, x in iterate_images(painter(networks)) for item in zip(n.tolist(), x, strict=True))
    assert list(whole) == list(range(10)) and whole[0].shape == (16, 16, 3) and whole[0].dtype == np.uint8
    p = painter(networks)
    open_folder(tmp_path, p.identity())
    save_npz(part_of(tmp_path, 1), (3, 16, 16, 3), [np.full((3, 16, 16, 3), 7, np.uint8)], np.zeros(3))
    shared = {}
    for rank in range(3):
        for numbers, pictures in iterate_images(p, rank=rank, world=3, folder=tmp_path):
            assert not set(numbers.tolist()) & set(shared)
            shared |= dict(zip(numbers.tolist(), pictures, strict=True))
    assert sorted(shared) == list(range(10)) and (shared[4] == 7).all()  # read, not drawn
    assert all((shared[i] == whole[i]).all() for i in (0, 1, 2, 6, 7, 8, 9))


def test_two_processes_write_the_bytes_of_one(files, tmp_path, capsys):
    more = ["--count", 26, "--batch", 4, "--plan", "random", "--seed", 3, "--out"]
    assert cli.main(words(files, *more, tmp_path / "a.png", "--npz", tmp_path / "a.npz")) == 0
    assert "images/s" in capsys.readouterr().out
    two = [start(r, 2, words(files, *more, tmp_path / "b.png", "--npz", tmp_path / "b.npz")) for r in range(2)]
    told = [end(p) for p in two]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert "26 pictures of 4 classes" in told[0] and told[1] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npz", "a.png", "b.json", "b.npz", "b.png"]
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"].shape == (26, 16, 16, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == plan_labels("random", 26, [0, 1, 2, 3], 3)
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["identity"]["cfg_scale"] == 3.0 and about["about"]["labels"] == "random"
    with Image.open(tmp_path / "b.png") as grid:
        assert json.loads(grid.text["megastar"])["seed"] == 3


def test_a_killed_rank_is_survived_and_the_work_taken_up_again(files, tmp_path, monkeypatch):
    folder, more = tmp_path / "parts", ["--count", 60, "--batch", 2, "--folder"]
    victim = start(1, 2, words(files, *more, folder))
    until = time.time() + 120
    while not list(folder.glob("part-*.npz")):
        assert victim.poll() is None and time.time() < until
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    first = {p: p.stat().st_ino for p in folder.glob("part-*.npz")}
    assert 0 < len(first) < 30
    (folder / "00029.claim").write_text(json.dumps({"host": claims.socket.gethostname(), "pid": victim.pid}))
    (folder / f"part-00029.npz.{claims.socket.gethostname()}.{victim.pid}.tmp").write_bytes(b"half")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(files, *more, folder, "--npz", tmp_path / "a.npz", "--out", tmp_path / "a.png")) == 0
    monkeypatch.undo()
    assert {p: p.stat().st_ino for p in first} == first  # not drawn again
    assert len(list(folder.glob("part-*.npz"))) == 30 and len(list(folder.iterdir())) == 31
    more = ["--count", 60, "--batch", 2, "--out", tmp_path / "b.png", "--npz"]
    assert cli.main(words(files, *more, tmp_path / "b.npz")) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_another_request_is_refused_and_the_same_is_done(files, tmp_path, capsys, monkeypatch):
    npz = tmp_path / "a.npz"
    more = ["--count", 5, "--out", tmp_path / "a.png", "--npz"]
    assert cli.main(words(files, *more, npz)) == 0
    before = npz.stat().st_ino
    assert cli.main(words(files, *more, npz)) == 0 and "is there already" in " ".join(capsys.readouterr().out.split())
    assert npz.stat().st_ino == before
    for option, value, sentence in [
        ("--cfg-scale", 1.5, "a.json is of other pictures: cfg_scale 3.0, not 1.5; name another place"),
        ("--seed", 9, "seed 0, not 9"),
        ("--batch", 3, "batch 5, not 3"),
    ]:
        assert cli.main(words(files, *more, npz, option, value)) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "a.json").unlink()
    assert cli.main(words(files, *more, npz)) == 2
    assert "a.npz exists and" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    assert cli.main(words(files, *more, tmp_path / "b.npz")) == 2
    assert "MB free: free space or name another place" in capsys.readouterr().err
    assert not (tmp_path / "b.npz.parts").exists()


def test_a_folder_of_other_things_is_refused(networks, tmp_path):
    p = painter(networks)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things \(notes.txt\) and no plan.json: name an empty folder"):
        open_folder(tmp_path, p.identity())
    open_folder(tmp_path / "new", p.identity())
    with pytest.raises(UserError, match="of other pictures: count 10, not 11; labels_sha256"):
        open_folder(tmp_path / "new", painter(networks, 11).identity())
    (tmp_path / "new" / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan.json is no plan of pictures"):
        open_folder(tmp_path / "new", p.identity())


def test_a_damaged_part_is_named(networks, tmp_path):
    p = painter(networks)
    open_folder(tmp_path, p.identity())
    sample_folder(p, tmp_path)
    part = part_of(tmp_path, 2)
    good = part.read_bytes()
    part.write_bytes(good[:-40])
    with pytest.raises(UserError, match=r"part-00002.npz is damaged .*: remove it and start again"):
        distributed.join_parts(p, tmp_path, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists() and not list(tmp_path.glob("*.tmp"))
    part.unlink()
    sample_folder(p, tmp_path)
    assert part.read_bytes() == good


def test_nan_logits_name_token_class_and_rank(networks, tmp_path):
    broken = Transformer(CFG).eval()
    broken.load_state_dict(networks[0].state_dict())
    broken.cls_embedding.embedding_table.weight.data[2] = torch.nan
    p = Painter(broken, networks[1], [0, 1, 2, 3], batch=4, rank=5)
    open_folder(tmp_path, p.identity())
    with pytest.raises(UserError, match=r"logits of token 0 are not finite for class 2 \(rank 5\)"):
        sample_folder(p, tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["plan.json"]  # no part, no claim
    with pytest.raises(UserError, match=r"class 4 is outside 0\.\.3"):
        Painter(*networks, [0, 4])


# Claims and files --------------------------------------------------------------------------------------------
def test_claims_belong_to_one_and_are_taken_from_the_dead(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = claims.socket.gethostname()
    with Claims(tmp_path) as mine:
        assert mine.take("a") and not Claims(tmp_path).take("a")
        (tmp_path / "dead.claim").write_text(json.dumps({"host": host, "pid": ended.pid}))
        (tmp_path / "far.claim").write_text(json.dumps({"host": "other", "pid": 1}))
        (tmp_path / "cut.claim").write_text('{"ho')
        (tmp_path / "odd.claim").write_text("[]")
        assert Claims(tmp_path).take("dead") and not Claims(tmp_path).take("far")
        old = time.time() - claims.STALE - 5
        for name in ("far", "cut", "odd"):
            assert not Claims(tmp_path).take(name)
            os.utime(tmp_path / f"{name}.claim", (old, old))
            assert Claims(tmp_path).take(name) and not Claims(tmp_path).take(name)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["cut", "dead", "far", "odd"]


def test_a_living_claim_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "TOUCH", 0.01)
    with Claims(tmp_path) as mine:
        assert mine.take("a")
        os.utime(mine.held, (1, 1))
        until = time.time() + 20
        while mine.held.stat().st_mtime < 2 and time.time() < until:
            time.sleep(0.01)
        assert mine.held.stat().st_mtime > 2
        held, mine.held = mine.held, tmp_path / "gone.claim"  # removed by another: the next one must still be touched
        time.sleep(0.05)
        mine.held = held
        os.utime(held, (1, 1))
        while held.stat().st_mtime < 2 and time.time() < until:
            time.sleep(0.01)
        assert held.stat().st_mtime > 2


def test_npz_is_streamed_and_its_bytes_are_the_pictures_alone(tmp_path):
    piece = np.arange(256, dtype=np.uint8).repeat(3 * 64 * 16).reshape(64, 64, 64, 3)
    tracemalloc.start()
    save_npz(tmp_path / "deep" / "a.npz", (64 * 40, 64, 64, 3), (piece for _ in range(40)), np.arange(64 * 40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * piece.nbytes  # of 40
    pictures, labels = read_npz(tmp_path / "deep" / "a.npz")
    assert (pictures.reshape(40, *piece.shape) == piece).all() and labels.tolist() == list(range(64 * 40))
    save_npz(tmp_path / "deep" / "b.npz", pictures.shape, [pictures], labels)
    assert (tmp_path / "deep" / "a.npz").read_bytes() == (tmp_path / "deep" / "b.npz").read_bytes()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.npz", "b.npz"]
    with pytest.raises(AssertionError):
        save_npz(tmp_path / "c.npz", (3, 64, 64, 3), [piece], labels)
    assert not list(tmp_path.glob("c*"))
