"""Sampling by several processes: the same bytes for any number of ranks, after crashes and after restarts."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import socket
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from megastar import cli
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling import distributed
from megastar.sampling.distributed import (
    SamplingPipeline,
    iterate_images,
    open_folder,
    part_of,
    plan_labels,
    sample_folder,
)
from megastar.sampling.npz import read_npz, save_npz
from megastar.sampling.options import SamplingOptions
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from megastar.utils import lockfile
from tests.checkpoints import save_model
from tests.integration.helpers.s3 import free_port

ROOT = Path(__file__).resolve().parents[3]
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: another number may round otherwise
    yield
    torch.set_num_threads(threads)


def make_pipeline(networks, count=10, **changes) -> SamplingPipeline:
    kwargs = {"batch": 3, "options": SamplingOptions(cfg_scale=2.0)} | changes
    return SamplingPipeline(*networks, plan_labels("balanced", count, [0, 1, 2, 3], 0), **kwargs)


def words(files, *more) -> list[str]:
    return ["sample", str(files[0]), "--tokenizer", str(files[1]), *map(str, more)]


# One server imports torch once and forks every rank from there: a start costs nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["megastar.commands.sample", "megastar.evaluation.runner", "tests.unit.sampling.test_distributed"]
)


def start(rank: int, world: int, arguments: list[str], output: Path, run=None, **environ: str):
    """The rank's process. ``run`` replaces ``run_rank``."""
    environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    process = SERVER.Process(target=run or run_rank, args=(arguments, environ, output), daemon=True)
    process.start()
    return process


def run_rank(arguments: list[str], environ: dict[str, str], output: Path) -> None:
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(environ)
    torch.set_num_threads(1)
    with output.open("w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        status = cli.main(arguments)
    sys.exit(status)


def run_one_part(arguments: list[str], environ: dict[str, str], output: Path) -> None:
    """A rank that stands still in its second part."""
    sample, begun = SamplingPipeline.sample_chunk, []

    def sample_one(self, *args):
        begun.append(args)
        if len(begun) == 2:
            time.sleep(600)
        return sample(self, *args)

    SamplingPipeline.sample_chunk = sample_one
    run_rank(arguments, environ, output)


def end(process: multiprocessing.Process, output: Path) -> str:
    process.join(240)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


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
def test_ranks_share_the_images_as_they_are_sampled(networks, tmp_path):
    whole = dict(item for n, x in iterate_images(make_pipeline(networks)) for item in zip(n.tolist(), x, strict=True))
    assert list(whole) == list(range(10)) and whole[0].shape == (16, 16, 3) and whole[0].dtype == np.uint8
    p = make_pipeline(networks)
    open_folder(tmp_path, p.identity())
    save_npz(part_of(tmp_path, 1), (3, 16, 16, 3), [np.full((3, 16, 16, 3), 7, np.uint8)], np.zeros(3))
    shared = {}
    for rank in range(3):
        for indices, images in iterate_images(p, rank=rank, world=3, folder=tmp_path):
            assert not set(indices.tolist()) & set(shared)
            shared |= dict(zip(indices.tolist(), images, strict=True))
    assert sorted(shared) == list(range(10)) and (shared[4] == 7).all()  # read, not sampled
    assert all((shared[i] == whole[i]).all() for i in (0, 1, 2, 6, 7, 8, 9))


def test_two_processes_write_the_bytes_of_one(files, tmp_path):
    more = ["--count", 26, "--batch", 4, "--plan", "random", "--seed", 3, "--out"]
    assert cli.main(words(files, *more, tmp_path / "a.png", "--npz", tmp_path / "a.npz")) == 0
    output = [tmp_path / "output" / str(r) for r in range(2)]
    output[0].parent.mkdir()
    arguments = words(files, *more, tmp_path / "b.png", "--npz", tmp_path / "b.npz")
    two = [start(r, 2, arguments, output[r]) for r in range(2)]
    printed = [end(p, output[r]) for r, p in enumerate(two)]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert "26 images of 4 classes" in printed[0] and printed[1] == ""
    output[0].unlink(), output[1].unlink(), output[0].parent.rmdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.npz",
        "a.npz.json",
        "a.png",
        "b.npz",
        "b.npz.json",
        "b.png",
    ]
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"].shape == (26, 16, 16, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == plan_labels("random", 26, [0, 1, 2, 3], 3)
    record = json.loads((tmp_path / "a.npz.json").read_text())
    assert (record["identity"]["cfg_scale"], record["identity"]["temperature"]) == (1.0, 1.0)  # as trained, for scores
    assert record["about"]["label_plan"] == "random"
    with Image.open(tmp_path / "b.png") as grid:
        assert json.loads(grid.text["megastar"])["seed"] == 3


def test_sampling_continues_after_a_rank_was_killed(files, tmp_path, monkeypatch):
    folder, more = tmp_path / "parts", ["--count", 60, "--batch", 2, "--folder"]
    victim = start(1, 2, words(files, *more, folder), tmp_path / "output", run=run_one_part)
    until = time.monotonic() + 120
    while not list(folder.glob("part-*.npz")):
        assert victim.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    victim.kill()
    victim.join()
    first = {p: p.stat().st_ino for p in folder.glob("part-*.npz")}
    assert len(first) == 1
    (folder / "00029.claim").write_text(json.dumps({"machine": lockfile.machine(), "pid": victim.pid, "start": "1"}))
    (folder / f"part-00029.npz.{socket.gethostname()}.{victim.pid}.tmp").write_bytes(b"half")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(files, *more, folder, "--npz", tmp_path / "new" / "a.npz", "--out", tmp_path / "a.png")) == 0
    monkeypatch.undo()
    assert {p: p.stat().st_ino for p in first} == first  # not sampled again
    assert len(list(folder.glob("part-*.npz"))) == 30 and len(list(folder.iterdir())) == 31
    more = ["--count", 60, "--batch", 2, "--out", tmp_path / "b.png", "--npz"]
    assert cli.main(words(files, *more, tmp_path / "b.npz")) == 0
    assert (tmp_path / "new" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_scores_while_sampling_are_those_of_the_file_and_of_two_processes(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "pixel_features.py").write_text("def mean(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", real)
    how = ["--real", tmp_path / "real.npz", "--features", "pixel_features:mean", "--metrics", "fd,pr,kid"]
    how += ["--kid-size", "10", "--kid-subsets", "5"]
    draw = ["--count", 26, "--batch", 4, "--seed", 3, "--cfg-scale", 2]
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))

    assert cli.main(words(files, *draw, *how, "--score", tmp_path / "one.json")) == 0
    assert cli.main(words(files, *draw, *how, "--score", tmp_path / "kept.json", "--folder", tmp_path / "parts")) == 0
    gloo = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(tmp_path)}
    gloo["MEGASTAR_CACHE"] = str(tmp_path / "cache")  # the server that forks the ranks has another one
    arguments = words(files, *draw, *how, "--score", tmp_path / "two.json")
    two = [start(r, 2, arguments, tmp_path / f"output{r}", **gloo) for r in range(2)]
    assert ["KD-pixel" in end(p, tmp_path / f"output{r}") for r, p in enumerate(two)] == [True, False]  # rank 0 prints
    assert cli.main(words(files, *draw, "--npz", tmp_path / "a.npz", "--out", tmp_path / "a.png")) == 0
    evaluated = ["evaluate", tmp_path / "a.npz", *how, "--out", tmp_path / "file.json"]
    assert cli.main([str(w) for w in evaluated]) == 0

    one, kept, two, file = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "kept", "two", "file"))
    assert list(one["scores"]) == [f"{n}-pixel_features:mean" for n in ("FD", "precision", "recall", "KD")]
    for other in (kept, two, file):
        assert other["scores"] == pytest.approx(one["scores"], rel=1e-6) and other["not_recorded"] == []
        assert {k: other["provenance"][k] for k in other["provenance"] if k != "command"} == {
            k: v for k, v in one["provenance"].items() if k != "command"
        }
        assert other["generated"]["classes"] == {"classes": 4, "fewest": 6, "most": 7}
    origin = one["provenance"]
    assert [origin[k] for k in ("label_plan", "cfg_scale", "dtype", "seed")] == ["balanced", 2.0, "fp32", 3]
    assert origin["weights"] == str(files[0]) and len(origin["weights_sha256"]) == len(origin["tokenizer_sha256"]) == 64
    assert two["generated"]["processes"] == 2 and one["generated"]["source"] == "drawn while scoring"
    drawn = {"a.npz", "a.npz.json", "a.png", "cache", "parts", "__pycache__"}
    assert {
        p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".py") and "output" not in p.name
    } <= drawn | {"real.npz"}

    capsys.readouterr()
    for more, sentence in [
        (["--score", tmp_path / "x.json"], "must be given together"),
        ([*how], "must be given together"),
        (
            [*how, "--score", tmp_path / "x.json", "--npz", tmp_path / "b.npz"],
            "--score keeps no images: leave out --npz",
        ),
        (
            [*how[:4], "--metrics", "kid", "--score", tmp_path / "x.json"],
            "the request: 26 images, but kid requires 1000",
        ),
        (["--real", tmp_path / "no.npz", "--score", tmp_path / "x.json"], "no.npz does not exist"),
        (
            [*how, "--real-subset", "val", "--score", tmp_path / "x.json", "--folder", tmp_path / "new_parts"],
            "real.npz: an .npz has no top-level folders, so the subset val cannot be chosen",
        ),
    ]:
        monkeypatch.setattr(SamplingPipeline, "sample_chunk", None)  # reported before the first image is sampled
        assert cli.main(words(files, *draw, *more)) == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "new_parts").exists()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(files, *draw, *how, "--score", tmp_path / "x.json")) == 2
    assert "MASTER_ADDR is not set: start with --nproc or torchrun" in capsys.readouterr().err


def test_images_are_resized_before_rounding(networks, files, tmp_path, capsys):
    p, small = make_pipeline(networks, 3), make_pipeline(networks, 3, size=8)
    with torch.no_grad():
        images = networks[1].decode_codes(p.sampler.draw(torch.tensor(p.labels), p.seeds))
    wanted = torch.nn.functional.interpolate(images, size=(8, 8), mode="bicubic")  # LlamaGen's sample_c2i_ddp.py
    wanted = (127.5 * wanted + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = small.sample_chunk(0)
    assert got.shape == (3, 8, 8, 3) and np.abs(got.astype(int) - wanted).max() <= 1 and (got == wanted).mean() > 0.99
    assert small.identity()["resize"] == "bicubic from 16" and p.identity()["resize"] is None
    assert small.shape == (3, 8, 8, 3) and small.identity()["image_size"] == 8


def test_progress_bar_and_classes_of_another_model(networks):
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True, color_system=None)
    assert len(list(iterate_images(make_pipeline(networks, 4), console=console))) == 2
    assert re.search(r"sampling .* 4/4 .*images/s", text.getvalue())
    for label in (-1, 4):
        with pytest.raises(UserError, match=rf"class {label} is outside 0\.\.3, the classes of the model"):
            SamplingPipeline(*networks, [0, label])


def test_weights_trained_with_another_tokenizer_are_rejected(networks, files, tmp_path, capsys):
    save_model(tmp_path / "w.safetensors", networks[0].state_dict(), CFG, {"step": 1, "tokenizer": "ab" * 32})
    assert cli.main(words((tmp_path / "w.safetensors", files[1]), "--out", tmp_path / "a.png")) == 2
    assert "was trained on codes of the tokenizer abababababab" in capsys.readouterr().err


def test_another_request_is_rejected_and_a_finished_one_is_not_repeated(files, tmp_path, capsys, monkeypatch):
    npz = tmp_path / "a.npz"
    more = ["--count", 5, "--out", tmp_path / "a.png", "--npz"]
    assert cli.main(words(files, *more, npz)) == 0
    before = npz.stat().st_ino
    assert cli.main(words(files, *more, npz)) == 0 and "is already complete" in " ".join(
        capsys.readouterr().out.split()
    )
    assert npz.stat().st_ino == before
    for option, value, sentence in [
        ("--cfg-scale", 1.5, "a.npz.json records other images: cfg_scale 1.0, not 1.5; choose another output path"),
        ("--seed", 9, "seed 0, not 9"),
        ("--batch", 3, "batch 5, not 3"),
    ]:
        assert cli.main(words(files, *more, npz, option, value)) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "a.npz.json").unlink()
    assert cli.main(words(files, *more, npz)) == 2
    assert "a.npz exists, but its record" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    assert cli.main(words(files, *more, tmp_path / "b.npz")) == 2
    assert " free: free space or name another place" in capsys.readouterr().err
    assert not (tmp_path / "b.npz.parts").exists()


def test_a_folder_with_other_files_is_rejected(networks, tmp_path):
    p = make_pipeline(networks)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has no plan.json but other files \(notes.txt\): name an empty folder"):
        open_folder(tmp_path, p.identity())
    open_folder(tmp_path / "new", p.identity())
    with pytest.raises(UserError, match="records other images: count 10, not 11; labels_sha256"):
        open_folder(tmp_path / "new", make_pipeline(networks, 11).identity())
    (tmp_path / "new" / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan.json is damaged: it is not JSON"):
        open_folder(tmp_path / "new", p.identity())


def test_a_damaged_part_is_named(networks, tmp_path):
    p = make_pipeline(networks)
    open_folder(tmp_path, p.identity())
    sample_folder(p, tmp_path)
    part = part_of(tmp_path, 2)
    good = part.read_bytes()
    part.write_bytes(good[:-40])
    with pytest.raises(UserError, match=r"part-00002.npz is damaged .*: remove it and run again"):
        distributed.join_parts(p, tmp_path, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists() and not list(tmp_path.glob("*.tmp"))
    part.unlink()
    sample_folder(p, tmp_path)
    assert part.read_bytes() == good


def test_nan_logits_name_token_class_and_rank(networks, tmp_path):
    broken = Transformer(CFG).eval()
    broken.load_state_dict(networks[0].state_dict())
    broken.cls_embedding.embedding_table.weight.data[2] = torch.nan
    p = SamplingPipeline(broken, networks[1], [0, 1, 2, 3], batch=4, rank=5)
    open_folder(tmp_path, p.identity())
    with pytest.raises(UserError, match=r"logits of token 0 are not finite for class 2 \(rank 5\)"):
        sample_folder(p, tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["plan.json"]  # no part, no claim
    with pytest.raises(UserError, match=r"class 4 is outside 0\.\.3"):
        SamplingPipeline(*networks, [0, 4])


# Files --------------------------------------------------------------------------------------------
def test_npz_is_streamed_and_its_bytes_depend_on_the_images_only(tmp_path):
    piece = np.arange(256, dtype=np.uint8).repeat(3 * 64 * 16).reshape(64, 64, 64, 3)
    tracemalloc.start()
    save_npz(tmp_path / "deep" / "a.npz", (64 * 40, 64, 64, 3), (piece for _ in range(40)), np.arange(64 * 40))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * piece.nbytes  # of 40
    images, labels = read_npz(tmp_path / "deep" / "a.npz")
    assert (images.reshape(40, *piece.shape) == piece).all() and labels.tolist() == list(range(64 * 40))
    save_npz(tmp_path / "deep" / "b.npz", images.shape, [images], labels)
    assert (tmp_path / "deep" / "a.npz").read_bytes() == (tmp_path / "deep" / "b.npz").read_bytes()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.npz", "b.npz"]
    with pytest.raises(AssertionError):
        save_npz(tmp_path / "c.npz", (3, 64, 64, 3), [piece], labels)
    assert not list(tmp_path.glob("c*"))
