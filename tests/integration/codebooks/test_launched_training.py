"""`megastar train-tokenizer` as real processes: signals, the launchers of one machine, and exit statuses."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megastar.run_dir.events import read_events
from tests.dist.test_tokenizer import CONFIG, write_images
from tests.integration.conftest import ROOT, environment

pytestmark = [pytest.mark.dist, pytest.mark.long]
TRAIN = ("-m", "megastar", "train-tokenizer")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *TRAIN)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    path = folder.parent / "tokenizer.yaml"
    fields = {"steps": 100_000, "pictures": str(write_images(folder)), "adversarial": 0.0, "save_every": 50_000}
    path.write_text(yaml.safe_dump(CONFIG | fields))
    return path


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_row(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [(TRAIN, signal.SIGINT, 85), ((*TRAIN, "--nproc", "2"), signal.SIGTERM, 143)],
    ids=["Ctrl-C", "--nproc"],
)
def test_a_signal_saves_the_last_step_and_the_same_command_resumes(config, tmp_path, words, number, status):
    process = start(*words, config, f"out={tmp_path}")
    wait_for_row(tmp_path, process)
    process.send_signal(number)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == status, text
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert step > 0 and f"signal {int(number)}: the state after step {step} of 100000 is saved" in text
    again = start(*words, config, f"out={tmp_path}", f"steps={step + 2}")
    text = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and f"resumed {tmp_path / 'last.pt'} at step {step}" in text, text
    kinds = [e["event"] for e in read_events(tmp_path)]
    assert kinds == ["started", "saved", "signal", "resumed", "saved", "finished"]


def test_torchrun(config, tmp_path):
    process = start(*TORCHRUN, config, f"out={tmp_path}", "steps=4")
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and f"{tmp_path}: 4 steps on 2 rank(s)" in text, text
    assert (tmp_path / "tokenizer.safetensors").is_file()
