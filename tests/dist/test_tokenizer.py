"""The tokenizer's training on several ranks: the state of one process, to 1e-5; resumed on other ranks; one sentence for bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megastar.engine.exit_codes import PREEMPTED
from tests import forker
from tests.unit.engine.tokenizer.leaves import leaves_of

pytestmark = pytest.mark.dist
# The rate is low because rounding decides what a discriminator's LeakyReLU and Adam's first steps make of values near 0.
CONFIG = {
    "tokenizer": {
        "image_size": 32, "channels": 8, "channel_multipliers": [1, 2, 2], "res_blocks": 1, "z_channels": 8,
        "codebook_size": 96, "codebook_embed_dim": 4, "norm_groups": 4,
    },
    "pictures": "${oc.env:IMAGES}", "steps": 8, "batch": 8, "warmup": 0, "lr": 2e-5, "continuous_steps": 3,
    "revive_every": 1, "perceptual": 0.0, "adversarial": 0.1, "adversarial_start": 4, "dtype": "fp32", "save_every": 100,
    "log_every": 1, "eval_every": 100,
}  # fmt: skip
WORKER = "tests/dist/workers/tokenizer_worker.py"


def write_images(folder: Path, count: int = 40) -> Path:
    """Random images of low frequencies in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / f"class{i % 2}").mkdir(exist_ok=True, parents=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((44, 40), Image.Resampling.BICUBIC).save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def train(images):
    """Train CONFIG into a folder; returns the process. ``words``: further fields."""
    config = images.parent / f"{images.name}.yaml"
    config.write_text(yaml.safe_dump(CONFIG))

    def run(out: Path, ranks: int, *words: str, worker: bool = False, **environment: str):
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "IMAGES")}
        clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "IMAGES": str(images)}
        command = [WORKER] if worker else ["-m", "megastar", "train-tokenizer"]
        return forker.run([*command, str(config), f"out={out}", *words], clean | environment, ranks, timeout=600)

    return run


def ok(done, status: int = 0) -> str:
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def one(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    ok(train(out, 0))
    return out


@pytest.fixture(scope="module")
def two(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    ok(train(out, 2))
    return out


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]


def events_of(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]


def difference(a: Path, b: Path) -> float:
    """The largest difference of weights, averages and optimizer states; all integers and random states are equal."""
    first, second = (dict(leaves_of(torch.load(p / "last.pt", weights_only=True))) for p in (a, b))
    assert first.keys() == second.keys()
    worst = 0.0
    for name, x in first.items():
        if name == ("config", "out"):
            continue
        if x.dtype.is_floating_point:
            worst = max(worst, (x - second[name]).abs().max().item())
        else:
            assert torch.equal(x, second[name]), name
    return worst


def assert_equal(out: Path, one: Path) -> None:
    assert difference(out, one) < 1e-5
    codes = ("batch_codes_used", "batch_perplexity")  # of the global batch
    for a, b in zip(rows_of(one), rows_of(out), strict=True):
        for name in ("step", "loss", "l2", "vq", "grad_norm", "discriminator", "dead", "lr", *codes):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), name


def test_the_run_has_what_is_compared(one):
    """Codes that are revived (until 0.8 of the steps), and a discriminator."""
    rows = rows_of(one)
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert sum(r["dead"] for r in rows[3:6]) > 0 and all("discriminator" in r for r in rows[4:])


def test_two_ranks_equal_one_process(one, two):
    assert_equal(two, one)


@pytest.mark.parametrize(("quantizer", "codes", "dimension"), [("lfq", 16, 4), ("ibq", 24, 4)])
def test_the_entropy_loss_is_that_of_the_global_batch(train, tmp_path, quantizer, codes, dimension):
    words = [f"tokenizer.quantizer={quantizer}", f"tokenizer.codebook_size={codes}", "adversarial=0", "entropy=0.5"]
    words += [f"tokenizer.codebook_embed_dim={dimension}", "continuous_steps=0", "entropy_temperature=1"]
    for ranks in (0, 2):
        ok(train(tmp_path / f"{ranks}", ranks, *words))
    assert_equal(tmp_path / "2", tmp_path / "0")


def test_four_ranks_equal_one_process(train, one, tmp_path):
    ok(train(tmp_path, 4))
    assert_equal(tmp_path, one)


def test_resumed_bit_for_bit_on_as_many_ranks(train, two, tmp_path):
    """A signal on one rank stops all after the same step."""
    stopped = ok(train(tmp_path, 2, worker=True, STOP_AT="5"), PREEMPTED)
    assert f"signal 10: the state after step 5 of 8 is saved in {tmp_path / 'last.pt'}; the same" in stopped
    ok(train(tmp_path, 2))
    assert difference(tmp_path, two) == 0
    strip = [{k: v for k, v in r.items() if k not in ("images_per_s", "step_s")} for r in rows_of(two)]
    assert strip == [{k: v for k, v in r.items() if k not in ("images_per_s", "step_s")} for r in rows_of(tmp_path)]
    assert events_of(tmp_path) == ["started", "saved", "signal", "resumed", "saved", "finished"]


def test_resumed_on_other_ranks(train, one, tmp_path):
    ok(train(tmp_path, 4, worker=True, STOP_AT="4"), PREEMPTED)
    ok(train(tmp_path, 2, worker=True, STOP_AT="6"), PREEMPTED)
    ok(train(tmp_path, 0))
    assert_equal(tmp_path, one)
    state = (tmp_path / "last.pt").read_bytes()
    refused = train(tmp_path, 2, "lr=1e-3")
    assert (
        refused.returncode == 2 and "another configuration (lr: 2e-05 -> 0.001): choose another out" in refused.stderr
    )
    assert refused.stderr.count("megastar: error") == 1 and (tmp_path / "last.pt").read_bytes() == state


def test_a_batch_that_does_not_divide(train, tmp_path):
    done = train(tmp_path / "out", 3)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    wanted = (
        "megastar: error: batch = 8 images of a step do not divide among 3 ranks: start 2 or 4 ranks, or set batch to a"
    )
    assert done.stderr.startswith(wanted)


def test_ranks_with_other_fields_or_images(train, images, tmp_path):
    """The first rank that differs reports it; nothing is written."""
    out = tmp_path / "out"
    done = ok(train(out, 2, "1:lr=0.1", worker=True), 2)
    sentence = "rank 1 has another configuration than rank 0 (lr = 0.1, not 2e-05): give all ranks the same command"
    assert f"rank 1, reported False: {sentence}\n" in done and f"rank 0, reported True: {sentence}\n" in done
    assert not out.exists()
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "class0" / "0.png").unlink()
    done = ok(train(out, 2, worker=True, IMAGES_1=str(fewer)), 2)
    assert "finds 39 images in" in done and "which differ from the 40 of rank 0: give all nodes the same images" in done
    assert not (out / "last.pt").exists()


def test_a_rank_that_can_read_no_image_ends_all(train, images, tmp_path):
    broken = shutil.copytree(images, tmp_path / "broken")
    for path in broken.rglob("*.png"):
        path.write_bytes(b"no image")
    done = ok(train(tmp_path / "out", 2, worker=True, IMAGES_1=str(broken)), 2)
    assert f"rank 1, reported False: no image of {broken} can be read: check the files" in done
    assert "no batch for step 1: no step was done" in done and "rank 0, reported True: no image of" in done
    assert not (tmp_path / "out" / "last.pt").exists()


def test_another_run_in_the_folder(train, tmp_path):
    (tmp_path / "config.yaml").write_text("run: x\nmodel: {dim: 64}\n")
    done = train(tmp_path, 2)
    assert done.returncode == 2 and "holds another kind of run (config.yaml has no field pictures)" in done.stderr
    assert done.stderr.count("megastar: error") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]
