"""`megastar train` as a user runs it: to the end, killed and resumed, refused, converted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from megastar import cli
from megastar.model.io import load_model
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import read_events
from tests.checkpoints import full_weights
from tests.integration.conftest import ROOT, environment, megastar

pytestmark = pytest.mark.dist


TIMES = ("images_per_s", "step_s", "data_wait_s", "save_blocked_s")
TIMES += ("memory_gib", "slowest_rank", "slowest_ratio")  # they differ as times do


def rows(run: Path) -> dict[int, dict]:
    """Step -> all that was written for it, timings aside."""
    out: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # being written
            break
        row = json.loads(line)
        out.setdefault(row.pop("step"), {}).update({k: v for k, v in row.items() if k not in TIMES})
    return out


def test_a_run_leaves_what_the_documentation_promises(whole):
    done = rows(whole)
    assert sorted(done) == list(range(1, 13))
    assert {"loss", "loss_ar", "loss_mim", "loss_step", "loss_view", "acc_step", "acc_view", "grad_norm", "lr"} <= set(
        done[5]
    )
    assert {"spread_student", "spread_teacher", "teacher_distance"} <= set(done[5])
    assert 0 < done[5]["spread_student"] < 1.5 and 0 < done[5]["teacher_distance"] < 1
    assert "val_loss_ar" in done[6] and "val_loss_ar" in done[12] and "val_loss_ar" not in done[5]
    assert done[1]["loss_ar"] == pytest.approx(
        torch.log(torch.tensor(64.0)).item(), rel=1e-4
    )  # the head starts at zero
    assert done[12]["loss_ar"] < done[1]["loss_ar"]
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008", "step-00000012"]  # keep_last 2
    assert (whole / "config.yaml").is_file() and list((whole / "tensorboard").iterdir())
    checkpoint_dir.verify(whole / "checkpoints/step-00000012")
    began = read_events(whole)[0]
    assert began["event"] == "started" and began["command"].startswith("megastar train ") and began["device"]
    assert began["packages"]["torch"] == torch.__version__ and "deepspeed" in began["packages"]


def start_and_stop(config: Path, run: Path, at_step: int, how: signal.Signals) -> int:
    """Start two ranks in a session of their own, signal them once ``at_step`` is logged; the launcher's status. SIGKILL ends
    the ranks as well, once there is a checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "megastar"]
    process = subprocess.Popen(
        [*command, "train", str(config)], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    try:
        while not (run / "metrics.jsonl").is_file() or max(rows(run), default=0) < at_step:
            assert time.monotonic() < deadline and process.poll() is None, process.poll()
            time.sleep(0.02)
        if how != signal.SIGKILL:
            os.killpg(process.pid, how)
            return process.wait(timeout=100)
        while checkpoint_dir.latest(run / "checkpoints") is None:  # it is written in the background
            assert time.monotonic() < deadline and process.poll() is None, process.poll()
            time.sleep(0.01)
        kill_all(process.pid)
        return process.wait(timeout=100)
    finally:
        if process.poll() is None:
            kill_all(process.pid)


def kill_all(launcher: int) -> None:
    """SIGKILL to a launcher and its ranks, which are in sessions of their own."""
    process = psutil.Process(launcher)
    victims = [process, *process.children(recursive=True)]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims[1:], timeout=100)


def test_an_interrupted_run_repeats_every_number(world, tmp_path):
    """Killed, then stopped by a signal; fp32 on CPU, dropout on, the last checkpoint some steps behind: equal to the last
    bit."""
    straight = world.write_config(tmp_path / "a.yaml", tmp_path / "a", steps=60, save_every=6)
    megastar("train", straight, ranks=2)
    broken = world.write_config(tmp_path / "b.yaml", tmp_path / "b", steps=60, save_every=6)
    killed_at = 0
    for how, at_step in ((signal.SIGKILL, 9), (signal.SIGTERM, 30)):
        start_and_stop(broken, tmp_path / "b", at_step, how)
        stopped_at = max(rows(tmp_path / "b"))
        assert killed_at < stopped_at < 60, "the run ended before the signal: the test proves nothing"
        found = checkpoint_dir.latest(tmp_path / "b/checkpoints")
        assert found is not None
        killed_at = stopped_at
    assert checkpoint_dir.step_in(found) >= stopped_at  # it saved on its way out
    megastar("train", broken, ranks=2)
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    last = "checkpoints/step-00000060"
    for kind in ("student", "ema"):
        a, b = (full_weights(tmp_path / name / last, kind) for name in "ab")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_says_so_and_a_longer_one_goes_on(world, tmp_path, whole):
    config = world.write_config(tmp_path / "run.yaml", whole)
    again = megastar("train", config, ranks=2)
    assert "is done: 12 of 12 steps" in again.stdout
    other = megastar("train", config, "optim.beta2=0.9", "self_guided.alpha=2", check=False)
    assert other.returncode == 2
    assert (
        "another configuration" in other.stderr
        and "optim.beta2" in other.stderr
        and "self_guided.alpha" in other.stderr
    )
    assert other.stderr.count("\n") <= 6 and "Traceback" not in other.stderr


def test_one_process_at_another_stage_goes_on_from_two(world, tmp_path):
    still = [f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")]  # it is drawn for each data rank
    two, one, step = tmp_path / "two", tmp_path / "one", "step-00000004"
    megastar("train", world.write_config(tmp_path / "two.yaml", two), *still, "train.steps=8", ranks=2)
    shutil.copytree(two / "checkpoints" / step, one / "checkpoints" / step)
    config = world.write_config(tmp_path / "one.yaml", one)
    out = megastar("train", config, *still, "train.steps=8", "parallel.deepspeed=configs/ds/zero1.json").stdout
    assert "resumed" in out and "at step 4" in out
    uninterrupted, resumed = rows(two), rows(one)
    assert sorted(resumed) == [5, 6, 7, 8]
    for number, row in resumed.items():
        for name, value in row.items():
            assert value == pytest.approx(uninterrupted[number][name], rel=2e-5, abs=2e-6), (number, name)


def test_convert_gives_the_gathered_weights(whole, tmp_path, capsys):
    out = tmp_path / "ema.safetensors"
    megastar("convert", whole, "--to", "safetensors", "--out", out)
    model, about = load_model(out)
    expected = full_weights(whole / "checkpoints/step-00000012", "ema")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert about["step"] == 12 and about["weights"] == "ema" and about["classes"] == ["circle", "square", "stroke"]
    assert cli.main(["convert", str(tmp_path / "nothing"), "--to", "safetensors", "--out", str(out)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_world_that_does_not_divide_the_batch(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    done = megastar("train", config, ranks=3, check=False)
    assert done.returncode != 0 and "8" in done.stderr and "3" in done.stderr and "divi" in done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_builds_everything_and_leaves_nothing(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    out = megastar("train", config, "--dry-run").stdout
    for word in ("parameters", "memory", "batch", "learning rate", "fake step"):
        assert word in out
    assert not (tmp_path / "run").exists()
