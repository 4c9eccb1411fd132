"""A run of random token order from training to samples: it resumes exactly, and nothing takes it for a raster run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import megastar as package
from megastar.checkpoint.find_weights import find_weights
from megastar.run_dir import checkpoint_dir
from megastar.sampling.npz import read_npz
from tests.checkpoints import full_weights
from tests.integration.conftest import ROOT, megastar

pytestmark = [pytest.mark.dist, pytest.mark.long]
RANDOM = ["token_order.kind=random", "token_order.anneal_start=0.25", "token_order.anneal_end=0.75"]
PURE = [f"method={ROOT}/configs/method/random.yaml"]


def rows(run: Path) -> dict[int, dict]:
    """Step -> all that was recorded at it."""
    found: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def newest(run: Path) -> Path:
    found = checkpoint_dir.latest(run / "checkpoints")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    """star: ST-AR with annealing; pure: AR that is never annealed; raster: AR. All of 12 steps, in one process."""
    out = tmp_path_factory.mktemp("orders")
    for name, fields in (("star", RANDOM), ("pure", PURE), ("raster", ["self_guided.enabled=false"])):
        config = world.write_config(out / f"{name}.yaml", out / name, keep_last=3)
        megastar("train", config, *fields)
    return out


def test_a_run_resumes_to_the_same_bits(folder):
    """While the share of permuted images falls, with dropout, from steps 4 and 8 of 12."""
    for step in (4, 8):
        again = folder / f"again{step}"
        shutil.copytree(folder / "star", again)
        for path in (again / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        megastar("train", folder / "star.yaml", *RANDOM, f"run={again}")
        for kind in ("student", "ema"):
            one, other = (full_weights(newest(run), kind) for run in (folder / "star", again))
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    table = full_weights(newest(folder / "star"), "student")["target_embeddings.weight"]
    assert table.shape == (16, 32) and table.abs().max() > 0


def test_ranks_make_no_difference(world, folder, tmp_path):
    still = [f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")]
    found = []
    for ranks, micro in ((1, 8), (2, 2)):
        config = world.write_config(
            tmp_path / "run.yaml", tmp_path / f"run{ranks}", steps=4, micro_batch=micro, val_every=4
        )
        megastar("train", config, *RANDOM, *still, ranks=ranks)
        found.append(rows(tmp_path / f"run{ranks}"))
    for step in range(1, 5):
        for name in ("loss", "loss_ar", "loss_mim", "loss_step", "loss_view", "grad_norm"):
            assert found[1][step][name] == pytest.approx(found[0][step][name], rel=1e-5, abs=1e-6), (step, name)
    assert found[1][4]["val_loss_ar"] == pytest.approx(found[0][4]["val_loss_ar"], rel=1e-5)


def test_the_order_cannot_change_on_resume(folder, tmp_path):
    """With config.yaml, which names the fields, and without it, from the checkpoint."""
    for name, fields, wanted in (
        ("pure", ["self_guided.enabled=false"], "token_order.kind: random -> raster"),
        ("raster", PURE, "token_order.kind: raster -> random"),
    ):
        done = megastar("train", folder / f"{name}.yaml", *fields, "train.steps=14", check=False)
        assert done.returncode == 2 and wanted in done.stderr, done.stderr
        copy = tmp_path / name
        shutil.copytree(folder / name, copy)
        (copy / "config.yaml").unlink()
        done = megastar("train", folder / f"{name}.yaml", *fields, "train.steps=14", f"run={copy}", check=False)
        kinds = ("random", "raster") if name == "pure" else ("raster", "random")
        assert done.returncode == 2, done.stderr
        assert (
            f"was trained in {kinds[0]} token order, this configuration has token_order.kind = {kinds[1]}"
            in done.stderr
        )
        (copy / "config.yaml").unlink(missing_ok=True)
    fields = [*PURE, "model.target_position=embedding", "train.steps=14", f"run={tmp_path / 'pure'}"]
    done = megastar("train", folder / "pure.yaml", *fields, check=False)
    assert done.returncode == 2 and "was trained with rotary, which cannot change on resume" in done.stderr


def test_initial_weights_of_another_order_must_be_asked_for(world, folder, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=2, val_every=0)
    for init, fields, theirs in (
        ("raster", PURE, "raster order"),
        ("pure", [], "random order (model.target_position rotary)"),
    ):
        words = [*fields, "self_guided.enabled=false", f"train.init={folder / init}", f"run={tmp_path / init}"]
        done = megastar("train", config, *words, check=False)
        assert done.returncode == 2 and f"was trained in {theirs}, this run reads tokens in " in done.stderr, (
            done.stderr
        )
        assert not (tmp_path / init).exists()
        megastar("train", config, *words, "train.init_any_order=true", "optim.lr=1e-12")
        one, other = (full_weights(newest(run), "ema") for run in (folder / init, tmp_path / init))
        assert {*one} ^ {*other} == {"target_embeddings.weight"}
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one if name in other)
    table = full_weights(newest(tmp_path / "raster"), "student")["target_embeddings.weight"]
    assert table.abs().max() < 1e-9  # from zeros, at that rate


def test_samples_in_several_steps(world, folder, tmp_path, caplog):
    common = [
        "--tokenizer",
        world.tokenizer,
        "--count",
        12,
        "--batch",
        4,
        "--device",
        "cpu",
        "--out",
        tmp_path / "grid.png",
    ]
    parallel = ["--parallel-steps", 5, "--cfg-scale", 2]
    megastar("sample", folder / "pure", *common, *parallel, "--npz", tmp_path / "one.npz")
    megastar("sample", folder / "pure", *common, *parallel, "--npz", tmp_path / "two.npz", "--nproc", 2)
    one, two = (read_npz(tmp_path / f"{name}.npz")[0] for name in ("one", "two"))
    assert one.shape == (12, 16, 16, 3) and np.array_equal(one, two)
    record = json.loads((tmp_path / "one.npz.json").read_text())
    assert {k: record["identity"][k] for k in ("parallel_steps", "schedule", "token_order")} == {
        "parallel_steps": 5, "schedule": "cosine", "token_order": "random",
    }  # fmt: skip
    done = megastar(
        "sample", folder / "pure", *common, "--parallel-steps", 6, "--npz", tmp_path / "one.npz", check=False
    )
    assert done.returncode == 2 and "parallel_steps 5, not 6" in done.stderr

    megastar("sample", folder / "pure", *common, "--schedule", "diagonal", "--npz", tmp_path / "diagonal.npz")
    record = json.loads((tmp_path / "diagonal.npz.json").read_text())["identity"]
    assert (record["schedule"], record["token_order"]) == ("diagonal", "diagonal")

    model = package.load(folder / "pure", tokenizer=world.tokenizer, device="cpu")
    of_class = np.tile([0, 1, 2], 4).tolist()
    drawn = model.sample(of_class, 1, cfg_scale=1, temperature=1, schedule="diagonal")
    assert np.array_equal(drawn, read_npz(tmp_path / "diagonal.npz")[0])
    labels = ["circle", "square", "stroke"]
    plain = model.sample(labels, 2, cfg_scale=1.5)
    assert np.array_equal(model.sample(labels, 2, cfg_scale=1.5, parallel_steps=16, token_order="raster"), plain)
    assert not np.array_equal(model.sample(labels, 2, cfg_scale=1.5, parallel_steps=4, schedule="uniform"), plain)

    for words, sentence in (
        (["raster", "--parallel-steps", 4], "these weights were trained in raster order"),
        (["raster", "--token-order", "random"], "these weights were trained in raster order"),
        (["pure", "--parallel-steps", 17], "parallel_steps 17 must be at most 16, the tokens of an image"),
        (["raster", "--schedule", "diagonal"], "schedule diagonal: these weights were trained in raster order"),
        (["pure", "--schedule", "diagonal", "--parallel-steps", 5], "4 x 4 tokens per step, 7 steps: leave it out"),
        (["pure", "--schedule", "uniform"], "--schedule uniform divides the tokens among --parallel-steps"),
    ):
        done = megastar("sample", folder / words[0], *words[1:], "--tokenizer", world.tokenizer, check=False)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
    done = megastar("sample", folder / "star", *common, *parallel)
    assert "0% of the images were permuted" in done.stdout + done.stderr
    caplog.clear()
    package.load(folder / "star", tokenizer=world.tokenizer, device="cpu").sample(0, parallel_steps=4)
    assert "0% of the images were permuted" in caplog.text


def test_weights_files_tell_their_order(world, folder, tmp_path):
    megastar("convert", folder / "pure", "--to", "safetensors", "--out", tmp_path / "w.safetensors")
    found = find_weights(tmp_path / "w.safetensors")
    assert found.config.target_position == "rotary"
    assert found.provenance["token_order"] == {"kind": "random", "permuted_share": 1.0}
    assert find_weights(folder / "star").provenance["token_order"]["permuted_share"] == 0.0  # annealed
    assert "token_order" not in find_weights(folder / "raster").provenance
    for source in (folder / "pure", tmp_path / "w.safetensors"):
        done = megastar("convert", source, "--to", "llamagen", "--out", tmp_path / "w.pt", check=False)
        assert done.returncode == 2 and "LlamaGen has no random token order" in done.stderr
        assert not (tmp_path / "w.pt").exists()
    assert "random order" in megastar("convert", "--inspect", folder / "pure").stdout
    megastar(
        "report", folder / "pure", "--tokenizer", world.tokenizer, "--out", tmp_path / "report.html", "--device", "cpu"
    )
    assert "random order" in (tmp_path / "report.html").read_text()
