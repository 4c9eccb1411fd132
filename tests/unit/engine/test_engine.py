"""Parts of the engine that need no process group: schedules, the EMA optimizer, checkpoint folders, metrics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.constants import default_pg_timeout

from megastar.config.schema import OptimConfig, RunConfig, SelfGuidedConfig, TrainConfig
from megastar.engine.context import Context
from megastar.engine.fault_tolerance.step_consensus import StepConsensus
from megastar.engine.lr_schedule import learning_rate, total_steps
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.zero.partitions import AdamWEMA, parameter_groups
from megastar.engine.zero.process_group import collective_timeout
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.utils.device import pick_dtype
from megastar.utils.files import sha256


def test_learning_rate_scales_with_the_batch_and_follows_its_schedule():
    cfg = RunConfig(optim=OptimConfig(lr=1e-4, warmup_steps=4), train=TrainConfig(global_batch=512))
    assert learning_rate(cfg.optim, cfg.train.global_batch, 0, 100) == pytest.approx(2e-4 / 4)
    assert [learning_rate(cfg.optim, cfg.train.global_batch, s, 100) for s in (3, 50, 99)] == [2e-4] * 3  # constant
    cfg.optim.scale_lr, cfg.optim.schedule = False, "cosine"
    assert learning_rate(cfg.optim, cfg.train.global_batch, 4, 104) == pytest.approx(1e-4)
    assert learning_rate(cfg.optim, cfg.train.global_batch, 54, 104) == pytest.approx(1e-4 * (0.01 + 0.99 / 2))
    assert learning_rate(cfg.optim, cfg.train.global_batch, 104, 104) == pytest.approx(1e-6)
    cfg.optim.schedule = "linear"
    assert learning_rate(cfg.optim, cfg.train.global_batch, 54, 104) == pytest.approx(1e-4 * (1 - 0.99 / 2))


def test_run_length_from_steps_or_epochs():
    cfg = RunConfig(train=TrainConfig(global_batch=256, epochs=50))
    assert total_steps(cfg.train, 1_281_167) == 250_228  # the paper's 5,004 steps an epoch, up to rounding
    cfg.train.steps = 7
    assert total_steps(cfg.train, 1_281_167) == 7


def test_the_average_follows_the_recursion_from_the_initial_weights():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50))
    plain = torch.nn.Parameter(p.detach().clone())
    ours = AdamWEMA([p], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    expected = p.detach().double()
    for step in range(20):
        ours.param_groups[0]["ema_decay"] = decay = min(0.9, (1 + step) / (10 + step))
        gradient = torch.randn(50)
        p.grad, plain.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, plain, rtol=1e-6, atol=1e-6)  # the step itself is torch's
        expected = decay * expected + (1 - decay) * p.detach().double()
    assert (ours.state[p]["ema"].double() - expected).abs().max() < 1e-6
    saved = ours.state_dict()
    fresh = AdamWEMA([torch.nn.Parameter(p.detach().clone())], lr=0.1)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state[fresh.param_groups[0]["params"][0]]["ema"], ours.state[p]["ema"])


def test_weight_decay_is_for_matrices_only():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, rest = parameter_groups(module, 0.05)
    assert decayed["weight_decay"] == 0.05 and [p.shape for p in decayed["params"]] == [(4, 3)]
    assert rest["weight_decay"] == 0.0 and len(rest["params"]) == 3


def test_self_guided_defaults_are_the_papers():
    s = SelfGuidedConfig()
    assert (s.alpha, s.beta, s.mask_ratio, s.positions, s.views, s.teacher_decay) == (1.0, 0.5, 0.25, 4, 2, 0.9999)


# Checkpoint folders ------------------------------------------------------------------------------------------------
def make_checkpoint(folder, step: int, content: bytes = b"x" * 100, **about):
    path = folder / checkpoint_dir.name_of(step)
    path.mkdir(parents=True)
    (path / "states.pt").write_bytes(content)
    files = {"states.pt": {"bytes": len(content), "sha256": sha256(path / "states.pt"), "whose": "rank 0"}}
    (path / checkpoint_dir.MANIFEST).write_text(
        json.dumps({"format": checkpoint_dir.FORMAT, "step": step, "files": files, **about})
    )
    return path


def test_latest_names_only_complete_checkpoints(tmp_path):
    assert checkpoint_dir.latest(tmp_path) is None
    a, b = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    (tmp_path / "latest").write_text(a.name + "\n")
    assert checkpoint_dir.latest(tmp_path) == a
    (tmp_path / "latest").unlink()  # killed between the rename and the pointer
    assert checkpoint_dir.latest(tmp_path) == b
    (b / checkpoint_dir.MANIFEST).unlink()
    assert checkpoint_dir.latest(tmp_path) == a
    (tmp_path / "latest").write_text(b.name + "\n")  # never trust a pointer to half a checkpoint
    assert checkpoint_dir.latest(tmp_path) == a
    assert checkpoint_dir.find_checkpoint(tmp_path) == a and checkpoint_dir.find_checkpoint(a) == a


def test_retention_keeps_the_last_and_each_nth_and_the_best(tmp_path):
    cfg = RunConfig(run=str(tmp_path), train=TrainConfig(keep_last=2, keep_every=30))
    for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 1.5)):
        make_checkpoint(tmp_path, step, val_loss_ar=loss)
    cfg.train.keep_best = True
    checkpoint_dir.retire(cfg.train, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_dir.name_of(s) for s in (20, 30, 40, 50)]
    cfg.train.keep_best = False
    checkpoint_dir.retire(cfg.train, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_dir.name_of(s) for s in (30, 40, 50)]


def test_retention_keeps_what_is_uploaded(tmp_path):
    cfg = RunConfig(run=str(tmp_path), train=TrainConfig(keep_last=1))
    used, *_ = [make_checkpoint(tmp_path, step) for step in (10, 20, 30)]
    checkpoint_dir.retire(cfg.train, tmp_path, {used})
    assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint_dir.name_of(s) for s in (10, 30)]


def test_damage_is_found_and_named(tmp_path):
    path = make_checkpoint(tmp_path, 10)
    checkpoint_dir.verify(path)
    (path / "states.pt").write_bytes(b"x" * 50 + b"y" + b"x" * 49)
    with pytest.raises(UserError, match="states.pt is damaged"):
        checkpoint_dir.verify(path)
    (path / "states.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="has 1 bytes, its manifest records 100"):
        checkpoint_dir.read_manifest(path)
    (path / "states.pt").unlink()
    with pytest.raises(UserError, match=r"lacks states.pt \(rank 0\)"):
        checkpoint_dir.read_manifest(path)
    (path / checkpoint_dir.MANIFEST).write_text('{"format": 1}')
    with pytest.raises(UserError, match="has format 1, this megastar reads 2"):
        checkpoint_dir.read_manifest(path)
    (path / checkpoint_dir.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="megastar.json is damaged"):
        checkpoint_dir.read_manifest(path)
    (path / checkpoint_dir.MANIFEST).unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint_dir.read_manifest(path)


# Agreement, metrics ------------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_is_seen_before_the_step():
    ctx = Context(0, 1, torch.device("cpu"), torch.float32)

    def agreed(*said: Any, **more: Any) -> tuple:
        return StepConsensus(ctx, *said, **more).result()

    assert agreed(torch.tensor(1.0), 0) == (True, 0, False, False, 1.0)
    assert agreed(torch.tensor(float("nan")), 15) == (False, 15, False, False, 0)
    assert agreed(torch.tensor(float("inf")), 0, True) == (False, 0, True, False, 0)
    assert agreed(torch.tensor(1.25), 10, out_of_data=True) == (True, 10, False, True, 1.25)
    assert agreed(torch.tensor(7.123456789), 2).loss == pytest.approx(torch.tensor(7.123456789).item(), abs=2**-32)
    assert agreed(torch.tensor(-3e38), 0).loss == -(2**17)  # bounded, so that any number of ranks can be summed


def test_a_resumed_run_holds_each_step_once(tmp_path):
    first = MetricsLogger(tmp_path, 0, 10, 1, True)
    for step in range(1, 6):
        first.step(step, 4, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')  # cut by a crash
    second = MetricsLogger(tmp_path, 3, 10, 1, True)
    second.step(4, 4, {"loss": 40.0})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert all(r["images_per_s"] > 0 for r in rows)


def test_validation_and_saves_are_not_part_of_a_steps_time(tmp_path, monkeypatch):
    wall, cpu = [100.0], [10.0]

    def work(seconds: float, busy: float) -> None:
        wall[0] += seconds
        cpu[0] += busy

    clocks = SimpleNamespace(perf_counter=lambda: wall[0], process_time=lambda: cpu[0])
    monkeypatch.setattr("megastar.engine.metrics.logger.time", clocks)
    metrics = MetricsLogger(tmp_path, 0, 10, 1, True)
    for step, (pause, pause_cpu, seconds, busy) in enumerate([(3, 2, 0.1, 0.05), (7, 0, 0.2, 0.15)], 1):
        with metrics.paused():
            work(pause, pause_cpu)
        work(seconds, busy)
        metrics.step(step, 4, {})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step_s"] for r in rows] == pytest.approx([0.1, 0.2])
    assert [r["images_per_s"] for r in rows] == pytest.approx([40, 20])
    assert metrics.step_cpu_s == pytest.approx(0.1) and not any("cpu" in name for r in rows for name in r)


def test_dtype_auto_is_one_of_the_two():
    device = torch.device("cpu")
    assert pick_dtype("auto", device) in (torch.bfloat16, torch.float32)
    assert pick_dtype("fp32", device) is torch.float32


def test_collectives_time_out_after_the_watchdog_and_after_a_wait_for_data():
    cfg = RunConfig()
    assert collective_timeout(cfg.faults, cfg.data).total_seconds() == 660
    cfg.data.shards, cfg.data.patience = "s3://bucket/codes", 5000
    assert collective_timeout(cfg.faults, cfg.data).total_seconds() > 600 + 5000
    cfg.faults.hang_timeout, cfg.data.shards = 0, "codes"
    assert collective_timeout(cfg.faults, cfg.data) == default_pg_timeout


def test_an_optimizer_under_zero_does_not_fetch_the_compiler_and_compiling_still_works():
    """In a process of its own, which has imported nothing yet."""
    code = """
import os, sys
from megastar.engine.zero.setup import import_muon
import_muon()
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules and "TORCHDYNAMO_DISABLE" not in os.environ
assert "torch._inductor.compile_fx" not in sys.modules
import torch
graphs = []
double = torch.compile(lambda x: x * 2, backend=lambda graph, inputs: graphs.append(graph) or graph)
assert double(torch.ones(2)).tolist() == [2.0, 2.0] and len(graphs) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
