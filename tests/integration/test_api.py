"""The public API end to end: the examples of docs/api.md, the notebook, an installed package, a run, S3."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

import megastar
from megastar.checkpoint.find_weights import SHIPPED_TOKENIZER
from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.reader import ShardSet
from megastar.sampling.npz import read_npz
from tests.integration.conftest import ROOT, environment
from tests.integration.conftest import megastar as command
from tests.integration.helpers.s3 import client_of

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


class FencedParser(doctest.DocTestParser):
    """Reads the examples of a Markdown page: its fences are no output."""

    def parse(self, string: str, name: str = "<string>") -> list:
        return super().parse(re.sub(r"^```.*$", "", string, flags=re.M), name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six emoji of one class as token shards, two views each."""
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(ROOT / "assets" / "emoji64" / "emoji64.tar") as tar:
        some = [m for m in tar if m.name.startswith("test/animals-nature/")][:6]
        tar.extractall(folder / "images", some, filter="data")
    pretokenize(
        folder / "images", "test", ROOT / SHIPPED_TOKENIZER, folder / "shards", crops="center-flip", workers=1,
        device="cpu", console=Console(quiet=True),
    )  # fmt: skip
    return folder / "shards"


# Examples ----------------------------------------------------------------------------------------------------------
def test_the_examples_of_the_documentation(shards, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = doctest.testfile(
        str(ROOT / "docs" / "api.md"), module_relative=False, parser=FencedParser(), globs={"shards": shards}
    )
    assert page.attempted > 30 and not page.failed
    module = doctest.testmod(importlib.import_module("megastar.api"))
    assert module.attempted >= 3 and not module.failed


def test_the_notebook(tmp_path, monkeypatch):
    """Its code cells run one after the other, in a process of their own, as in a kernel that starts in examples/."""
    assert NOTEBOOK.stat().st_size < 300_000
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and not any(path in NOTEBOOK.read_text() for path in ("/tmp/", "/home/", "/root/"))
    script = tmp_path / "notebook.py"
    script.write_text("display = print\n" + "\n\n".join(code))
    variables = environment() | {"TMPDIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, script], cwd=NOTEBOOK.parent, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# Equal to the commands ---------------------------------------------------------------------------------------------
def test_images_are_those_of_megastar_sample(tmp_path):
    command(
        "sample", "--classes", "food-drink,8", "--per-class", 3, "--seed", 7, "--batch", 4, "--device", "cpu", "--npz",
        tmp_path / "samples.npz", "--out", tmp_path / "grid.png",
    )  # fmt: skip
    drawn, labels = read_npz(tmp_path / "samples.npz")
    assert labels.tolist() == [3, 3, 3, 8, 8, 8]
    assert np.array_equal(megastar.load(device="cpu").sample(["food-drink", 8], n=3, seed=7, batch=4), drawn)


def test_codes_are_those_of_megastar_pretokenize(shards):
    with tarfile.open(ROOT / "assets" / "emoji64" / "emoji64.tar") as tar:
        tokens = ShardSet(shards)
        names = tokens.sources(0)
        images = [Image.open(tar.extractfile(f"{n}.webp")).convert("RGB") for n in names]
    codes, _ = tokens.gather(np.arange(6), np.zeros((6, 1), int))
    assert np.array_equal(megastar.load(device="cpu").encode(images), codes[:, 0])


@pytest.mark.dist
def test_a_run_is_loaded_with_its_tokenizer(whole):
    ema, student = (megastar.load(whole, weights=w, device="cpu") for w in ("ema", "student"))
    assert ema.classes == ["circle", "square", "stroke"] and ema.image_size == 16
    pairs = zip(ema.transformer.parameters(), student.transformer.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    newest = max((whole / "checkpoints").glob("step*"))
    assert np.array_equal(megastar.load(newest, device="cpu").sample("square"), ema.sample(1))
    assert {f.name.partition("-")[0] for f in (whole / "weights").iterdir()} == {"ema", "student"}


# Training ----------------------------------------------------------------------------------------------------------
FIT = """
import os, signal, sys, threading, time
from dataclasses import asdict
import megastar

path, run = sys.argv[1:]
first = megastar.Trainer(path).fit()
assert (first.step, first.finished, first.signal) == (4, True, 0) and first.checkpoint.is_dir(), first
config = megastar.load_config(path, ["train.steps=6"])
second = megastar.Trainer(config).fit()  # in the same process, from the first one's checkpoint
assert (second.step, second.finished) == (6, True) and second.checkpoint != first.checkpoint, second
assert megastar.Trainer(config).fit().step == 6  # nothing is left to do

def stop_when_it_runs():
    while not os.path.exists(os.path.join(run + "-stopped", "config.yaml")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

stopped = asdict(config) | {"run": run + "-stopped"}
threading.Thread(target=stop_when_it_runs, daemon=True).start()
left = megastar.Trainer(stopped).fit()
assert not left.finished and left.signal == signal.SIGTERM and left.step < 6, left
assert megastar.Trainer(stopped).fit().finished

for wrong in ({"train": {"step": 3}}, asdict(config) | {"data": {"shards": "nowhere"}}):
    try:
        megastar.Trainer(wrong).fit()
        raise AssertionError(wrong)
    except megastar.UserError as error:
        print("refused:", error)
print("still here")
"""


@pytest.mark.dist
def test_a_trainer_never_ends_the_interpreter(world, tmp_path):
    path = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=4, save_every=2, val_every=0)
    done = subprocess.run(
        [sys.executable, "-c", FIT, str(path), str(tmp_path / "run")], cwd=ROOT, env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "still here"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    assert [e["step"] for e in events if e["event"] == "resumed"][0] == 4
    assert "did you mean train.steps?" in done.stdout and "token shards folder nowhere does not exist" in done.stdout


# Elsewhere ---------------------------------------------------------------------------------------------------------
@pytest.mark.dist
def test_token_shards_on_s3_in_workers(s3, use_s3, shards, tmp_path):
    client = client_of(s3)
    for path in shards.iterdir():
        if path.is_file():
            client.upload_file(str(path), "codes", f"api/{path.name}")
    use_s3(s3)
    here = megastar.TokenDataset(shards)
    there = megastar.TokenDataset("s3://codes/api", cache=tmp_path / "cache", patience=60)
    assert len(there) == 6 and torch.equal(there[3]["codes"], here[3]["codes"])  # its threads are not in the workers
    loader = DataLoader(there, batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="fork")
    read = {int(i): c for batch in loader for i, c in zip(batch["id"], batch["codes"], strict=True)}
    assert sorted(read) == list(range(6)) and all(torch.equal(read[i], here[i]["codes"]) for i in range(6))
    there.close()


def test_an_installed_package_has_the_weights_and_the_types(tmp_path):
    """setup.py's own steps, without the network and without touching this environment."""
    library = tmp_path / "lib"
    steps = ["build_py", "--build-lib", library]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, check=True, capture_output=True)
    assert (library / "megastar" / "py.typed").is_file()
    code = f"""
import megastar
assert megastar.__file__.startswith({str(library)!r}), megastar.__file__
print(megastar.load(device="cpu"), megastar.load_config("configs/run/demo.yaml").model.name)
"""
    variables = environment() | {"PYTHONPATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "<megastar.Model nano: 9 classes, 64 x 64 images of 64 tokens, cpu> nano\n"
