"""The loop of the tokenizer's training in one process: stops, resumes, validation, what its folder holds."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megastar.config.schema import TokenizerTrainConfig
from megastar.engine.phase import PHASE, VALIDATION
from megastar.engine.tokenizer import trainer as loop
from megastar.engine.tokenizer.trainer import train_tokenizer
from megastar.errors import UserError
from megastar.evaluation.frechet import Statistics, frechet_distance
from megastar.evaluation.image_sources import load_images
from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata
from megastar.tokenizer.scores import score
from megastar.utils.signals import Preempted, StopFlag
from tests.unit.engine.tokenizer.leaves import leaves_of
from tests.unit.tokenizer.test_tokenizer import SMALL


class Stops(StopFlag):
    """A stop signal once ``when`` holds."""

    when = staticmethod(lambda: False)

    @property
    def signal(self) -> int:
        return signal.SIGTERM if self.when() else 0

    @signal.setter
    def signal(self, number: int) -> None:
        pass


def stopping(when) -> Stops:
    flag = Stops()
    flag.when = when
    return flag


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / ("train" if i < 12 else "val") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((20, 18), Image.Resampling.BICUBIC).save(path)
    return folder


class Features:
    """In place of EfficientNet, which takes seconds: the mean of each quarter of the image."""

    key, spatial_dim, device, metrics = "means", 0, torch.device("cpu"), ("fd",)

    def __call__(self, pixels, spatial=False):
        return torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 8).flatten(1), None

    def name(self, metric):
        return "FD-means"


@pytest.fixture(autouse=True)
def quick_features(monkeypatch):
    network = Features()
    monkeypatch.setattr(loop, "open_networks", lambda device, inception: [("fd", network)])


def config(images: Path, out: Path, **changes) -> TokenizerTrainConfig:
    fields = {
        "tokenizer": SMALL, "pictures": str(images), "subset": "train", "val_subset": "val", "out": str(out), "steps": 12,
        "batch": 4, "continuous_steps": 3, "revive_every": 2, "save_every": 6, "eval_every": 4, "log_every": 1,
        "perceptual": 0.0, "dtype": "fp32", "warmup": 2,
    }  # fmt: skip
    return TokenizerTrainConfig(**(fields | changes))


def rows_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_s", "step_s", "save_blocked_s")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    return [row for row in rows if len(row) > 1]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of an uninterrupted run, its result and scores."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        network = Features()
        patch.setattr(loop, "open_networks", lambda device, inception: [("fd", network)])
        return out, *train_tokenizer(config(images, out), "the command")


def test_stopped_after_any_step_it_resumes_bit_for_bit_and_writes_each_row_once(images, whole, tmp_path):
    for step in (0, 1, 5, 8, 9):
        with pytest.raises(Preempted):
            train_tokenizer(config(images, tmp_path), stop=stopping(lambda step=step: PHASE.done == step))
        assert (tmp_path / "last.pt").exists() == (step > 0)
    train_tokenizer(config(images, tmp_path))
    states = [dict(leaves_of(torch.load(p / "last.pt", weights_only=True))) for p in (whole[0], tmp_path)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if k != ("config", "out"))
    rows = rows_of(whole[0])
    assert rows == rows_of(tmp_path)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13)) and all(
        math.isfinite(r["loss"]) for r in rows if "loss" in r
    )
    assert [r["step"] for r in rows if "psnr" in r] == [4, 8, 12]


def test_a_signal_ends_a_validation_which_the_next_start_repeats(images, whole, tmp_path):
    with pytest.raises(Preempted):
        train_tokenizer(config(images, tmp_path), stop=stopping(lambda: PHASE.done == 8 and PHASE.phase == VALIDATION))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 8
    assert [r["step"] for r in rows_of(tmp_path) if "psnr" in r] == [4]
    train_tokenizer(config(images, tmp_path))
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_scores_are_those_of_the_written_tokenizer(images, whole):
    out, result, scores = whole
    model, pixels = load_tokenizer(result), torch.from_numpy(load_images(images, subset="val", size=16))
    found = scores["val"]
    assert set(found) == {"psnr", "psnr_of_mean", "ssim", "codes_used", "perplexity", "rFD-means"}
    wanted = score(model, pixels)
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=1e-3)  # the file is in half precision
    assert 1 <= found["perplexity"] <= 32
    from megastar.tokenizer.vq import to_images, to_pixels

    decoded = torch.from_numpy(to_pixels(model.decode_codes(model.encode(to_images(pixels)))))
    real, made = (Statistics().update(Features()(x)[0].numpy()) for x in (pixels, decoded))
    assert found["rFD-means"] == pytest.approx(frechet_distance(real, made), rel=0.05)
    assert json.loads((out / "scores.json").read_text())["scores"] == scores
    provenance = read_tokenizer_metadata(result)[1]
    assert provenance["command"] == "the command" and provenance["scores"] == scores and provenance["pictures"] == 12


def test_the_folder_is_that_of_a_run(whole):
    out = whole[0]
    assert [e["event"] for e in read_events(out)] == ["started", "saved", "saved", "finished"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"step-{s:08d}.png" for s in (4, 8, 12)]
    with Image.open(out / "samples" / "step-00000012.png") as grid:
        assert grid.size == (8 * 18 - 2, 2 * 18 - 2)  # eight images of 16 pixels above their reconstructions
        assert "originals above their reconstructions" in json.loads(grid.text["megastar"])["caption"]
    status = status_of(out)
    assert (status.state, status.step, status.steps, status.checkpoint_step) == ("finished", 12, 12, 12)
    assert status.validation.startswith("PSNR ") and status.validation.endswith("at step 12")
    assert not [line for line in status.health if not line.startswith("throughput fell")]  # of a machine that is busy


def test_the_report_shows_scores_and_reconstructions(whole, tmp_path):
    from megastar.commands import report

    assert report.main([str(whole[0]), "--out", str(tmp_path / "r.html"), "--no-attention"]) == 0
    html = (tmp_path / "r.html").read_text()
    for text in (
        "originals above their reconstructions",
        "images of 16 pixels, 32 codes of 4 dimensions",
        "<dt>PSNR</dt>",
    ):
        assert text in html, text
    assert html.count("data:image/webp") == 3
    assert "configuration: " not in html  # no note about one that cannot be read


def test_a_repeated_command_trains_no_step_and_writes_the_same(images, whole):
    out, result, scores = whole
    # safetensors writes the entries of its metadata in any order.
    before, state = (read_tokenizer_metadata(result), load_file(result)), (out / "last.pt").stat().st_mtime_ns
    again, found = train_tokenizer(config(images, out), "the command")
    assert found == scores and read_tokenizer_metadata(again) == before[0]
    assert all(torch.equal(x, before[1][name]) for name, x in load_file(again).items())
    assert (out / "last.pt").stat().st_mtime_ns == state
    assert [e["event"] for e in read_events(out)].count("finished") == 1


def test_fewer_steps_than_the_state_has_are_refused(images, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    out = tmp_path / "run"
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(
        UserError, match=r"last.pt has 12 steps, steps is 8: set steps to at least 12, or choose another out"
    ):
        train_tokenizer(config(images, out, steps=8))
    assert {p: p.read_bytes() for p in files} == files
    train_tokenizer(config(images, out, steps=13))
    assert read_tokenizer_metadata(out / "tokenizer.safetensors")[1]["steps"] == 13
    assert json.loads((out / "scores.json").read_text())["steps"] == 13


def test_other_images_or_another_run_are_refused(images, whole, tmp_path):
    out = tmp_path / "copy"

    shutil.copytree(whole[0], out)
    state = (out / "last.pt").read_bytes()
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "train/class0/0.png", more / "train/class0/more.png")
    cfg = config(images, out, steps=20)
    with pytest.raises(UserError, match=r"another configuration \(pictures: "):
        train_tokenizer(replace(cfg, pictures=str(more)))
    shutil.rmtree(images / "train" / "class9", ignore_errors=True)
    shutil.copytree(more / "train" / "class0", images / "train" / "class9")
    try:
        with pytest.raises(
            UserError, match=r"was trained on other images \(12, now \d+ in .*\): restore them, or choose"
        ):
            train_tokenizer(cfg)
    finally:
        shutil.rmtree(images / "train" / "class9")
    assert (out / "last.pt").read_bytes() == state
    (out / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds the checkpoints of a `megastar train` run: choose another out"):
        train_tokenizer(cfg)


def test_progress_lines_are_seconds_apart(images, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "megastar")
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)
    train_tokenizer(config(images, tmp_path, steps=40, val_subset="", eval_every=100))
    records = {id(r): r for r in caplog.records}.values()  # pytest may attach its handler to both loggers
    lines = [r for r in records if r.getMessage().startswith("step ") and "/40" in r.getMessage()]
    assert lines[-1].getMessage().startswith("step 40/40  loss ")
    times = [r.created for r in lines[:-1]]
    assert all(b - a >= 9.9 for a, b in zip(times, times[1:], strict=False))


def test_too_few_held_out_images_for_rfid(images, tmp_path, monkeypatch):
    network = Features()
    network.metrics = ("fid",)
    monkeypatch.setattr(loop, "open_networks", lambda device, inception: [("fid", network)])
    with pytest.raises(UserError, match="val: 8 images, but fid requires 2049"):
        train_tokenizer(config(images, tmp_path), inception="file")
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("steps", ["[/]", "-1", "true", "[1]", "null", "1e99", "99999999999999999999"])
def test_the_status_of_a_folder_with_a_wrong_configuration(tmp_path, steps):
    (tmp_path / "config.yaml").write_text(f"pictures: x\nsteps: {steps}\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "psnr": [1]}\n{"step": 4, "psnr": 1, "ssim": "x", "rFD-": {}}\n'
    )
    with pytest.raises(UserError, match=r"config.yaml cannot be used \(steps = .* is not a number of steps\)"):
        status_of(tmp_path)
    (tmp_path / "config.yaml").write_text("pictures: x\nsteps: 9\n")
    (tmp_path / "last.pt").write_bytes(b"")
    status = status_of(tmp_path)
    assert (status.step, status.steps, status.validation) == (4, 9, "PSNR 1.00 dB at step 4")
