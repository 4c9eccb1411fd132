"""Evaluations that are killed, stopped by a signal, repeated, or fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megastar.run_dir.evaluations import read_evaluations
from megastar.run_dir.events import read_events
from tests.integration.conftest import ROOT, environment, megastar
from tests.integration.evaluation.test_scheduled import scores, training

pytestmark = [pytest.mark.dist, pytest.mark.long]
WORDS = ["parallel.deepspeed=zero1", "eval.every=6", "eval.samples=64", "eval.batch=4", "train.keep_last=9"]


def start(config: Path, ranks: int) -> subprocess.Popen:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "megastar", "train", str(config), *WORDS]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def stop_in_evaluation(config: Path, run: Path, ranks: int, how: signal.Signals) -> int:
    """Signal a run while it evaluates for the first time; its exit status."""
    process, deadline = start(config, ranks), time.monotonic() + 200
    try:
        while not (run / "evaluating.json").exists():
            assert time.monotonic() < deadline and process.poll() is None, process.stderr.read().decode()[-3000:]
            time.sleep(0.005)
        # To the ranks themselves: torchrun would kill them after 30 s.
        for one in psutil.Process(process.pid).children() if ranks > 1 else [process]:
            os.kill(one.pid, how)
        return process.wait(timeout=100)
    finally:
        process.stderr.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    megastar("train", world.write_config(folder / "run.yaml", folder / "run"), *WORDS)
    return folder / "run"


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_a_killed_evaluation_is_repeated(world, tmp_path, straight):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    assert stop_in_evaluation(config, tmp_path / "run", 1, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "run/evaluations.jsonl").exists() and not scores(tmp_path / "run")
    status = json.loads(megastar("status", tmp_path / "run", "--json").stdout)
    assert status["evaluation"].startswith("evaluating step 6: ") and status["evaluation"].endswith(" of 64 images")
    megastar("train", config, *WORDS)
    assert training(tmp_path / "run") == training(straight) and scores(tmp_path / "run") == scores(straight)
    assert [r["step"] for r in lines(tmp_path / "run")] == [6, 12]
    assert not (tmp_path / "run/evaluating.json").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_signal_ends_it_and_the_next_start_repeats_it(world, tmp_path, straight, ranks):
    """No checkpoint is due at step 6: it is saved because of the signal."""
    config, run = world.write_config(tmp_path / "run.yaml", tmp_path / "run"), tmp_path / "run"
    status = stop_in_evaluation(config, run, ranks, signal.SIGTERM)
    assert status == (85 if ranks == 1 else 1)  # torchrun has one status of its own
    assert not (run / "evaluations.jsonl").exists()
    last = read_events(run)[-1]
    assert last["event"] == "signal" and last["step"] == 6 and "in an evaluation: saved" in last["text"]
    assert (run / "checkpoints/step-00000006").is_dir()
    megastar("train", config, *WORDS, ranks=ranks)
    assert [r["step"] for r in lines(run)] == [6, 12] and sorted(scores(run)) == [6, 12]
    if ranks == 1:
        assert training(run) == training(straight) and scores(run) == scores(straight)


def test_a_finished_evaluation_is_not_repeated(world, tmp_path, straight):
    """The run goes back to step 4, before its evaluations."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config, before = world.write_config(tmp_path / "run.yaml", run), lines(run)
    for step in (8, 12):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    (run / "checkpoints/latest").unlink()
    done = megastar("train", config, *WORDS)
    assert lines(run) == before and scores(run) == scores(straight) and training(run) == training(straight)
    again = [e["text"] for e in read_events(run) if e["event"] == "evaluated"][2:]
    assert len(again) == 2 and all(text.endswith("(recorded by an earlier start)") for text in again)
    assert "evaluating 64 samples" not in done.stdout + done.stderr


def test_the_last_evaluation_of_a_finished_run_is_caught_up(world, tmp_path, straight):
    """As after a signal in it: all steps are saved, its score is missing."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = lines(run)
    (run / "evaluations.jsonl").write_text(json.dumps(before[0]) + "\n")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{r}\n" for r in rows if not ("eval_fd" in r and '"step": 12' in r)))
    assert sorted(scores(run)) == [6]
    config = world.write_config(tmp_path / "run.yaml", run)
    megastar("train", config, *WORDS)
    assert scores(run) == scores(straight) and [r["step"] for r in lines(run)] == [6, 12]
    assert lines(run)[1]["key"] == before[1]["key"]
    megastar("train", config, *WORDS)  # nothing is left to do
    assert len(lines(run)) == 2 and scores(run) == scores(straight)


def test_a_stop_signal_in_the_last_evaluation_keeps_the_time_per_step(world, tmp_path):
    """The next start has no steps to measure; `megastar compare` reads the costs of a run from its events."""
    config, run = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=6), tmp_path / "run"
    assert stop_in_evaluation(config, run, 1, signal.SIGTERM) == 85
    last = read_events(run)[-1]
    assert (last["event"], last["step"]) == ("signal", 6) and last["step_cpu_s"] > 0
    megastar("train", config, *WORDS)
    assert [r["step"] for r in lines(run)] == [6] and sorted(scores(run)) == [6]
    assert [e["step_cpu_s"] for e in read_events(run) if "step_cpu_s" in e] == [last["step_cpu_s"]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failing_evaluation_is_a_warning(world, tmp_path, straight, ranks):
    """A reference whose pictures turn out to be damaged."""
    broken = tmp_path / "real"
    broken.mkdir()
    for i in range(3):
        (broken / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    config, run = world.write_config(tmp_path / "run.yaml", tmp_path / "run"), tmp_path / "run"
    megastar("train", config, *WORDS, f"eval.against={broken}", ranks=ranks)
    warnings = [e for e in read_events(run) if e["event"] == "warning" and e.get("situation") == "evaluation"]
    assert [e["step"] for e in warnings] == [6, 12]
    assert warnings[0]["text"].startswith("the evaluation of step 6 failed (") and "\n" not in warnings[0]["text"]
    assert "none of 3 images can be read" in warnings[0]["text"]
    assert not (run / "evaluations.jsonl").exists() and not scores(run)
    if ranks == 1:
        assert training(run) == training(straight)


def test_files_are_checked_before_the_run_starts(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
    for words, sentence in (
        (["eval.against=none.npz"], "none.npz does not exist"),
        (["eval.metric=fid", "eval.inception=none.pth", "eval.samples=3000"], "--inception none.pth does not exist"),
        (["eval.metric=fd_dinov2", f"eval.dinov2={tmp_path / 'x.pth'}"], "is not a DINOv2 network"),
    ):
        done = megastar("train", config, *WORDS, *words, check=False)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_scores_of_a_run_are_its_newest_protocol(tmp_path):
    base = {
        "epoch": 1.0,
        "metric": "FID",
        "samples": 10,
        "cfg_scale": 1.0,
        "weights": "ema",
        "against": "a",
        "key": "k",
    }
    rows = [base | {"step": s, "value": v, "samples": n} for s, v, n in ((1, 9.0, 5), (2, 8.0, 10), (3, 7.0, 10))]
    rows.append(base | {"step": 2, "value": 6.0})
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4}\nnot json\n'
    (tmp_path / "evaluations.jsonl").write_text(text)
    assert [(r["step"], r["value"]) for r in read_evaluations(tmp_path)] == [(2, 6.0), (3, 7.0)]
    assert [r["step"] for r in read_evaluations(tmp_path, until=2)] == [2]
