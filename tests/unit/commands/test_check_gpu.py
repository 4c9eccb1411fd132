"""megastar check-gpu without a GPU: the comparison, the report, what becomes of the measurements, a step on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megastar import cli
from megastar.commands import check_gpu
from megastar.config.schema import ModelConfig, ParallelConfig, RunConfig, SelfGuidedConfig, TrainConfig
from megastar.model.kernels import check, flex, sdpa, timing
from megastar.model.masks import PATTERNS, MaskSpec
from megastar.parallel import gpus

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(capsys) -> None:
    assert cli.main(["check-gpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "check-gpu needs a CUDA GPU and torch finds none" in error
    assert cli.main(["check-gpu", "--device", "tpu"]) == 2


def test_the_comparison_on_cpu(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check_gpu, "HEAD_DIMS", (16,))
    out = tmp_path / "deep" / "report.json"
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    made = [r for r in report["compared"] if r["ok"] is not None]
    assert {(r["backend"], r["pattern"], r["dtype"]) for r in made} == {
        ("sdpa", which, dtype) for which in PATTERNS for dtype in ("bfloat16", "float32")
    }
    assert report["packages"]["backends"]["sdpa"] is None and report["packages"]["nvidia_apex"] is False
    assert report["packages"]["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    text = capsys.readouterr().out
    assert "14 comparisons, 0 wrong" in text and "flex skipped: it has no backward pass on CPU" in text

    monkeypatch.setattr(flex, "supports", lambda *_: None)  # a wrong kernel: status 1, and the table of words says so
    monkeypatch.setattr(flex, "attention", lambda q, k, v, mask: sdpa.attention(q, k, v))
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(out)]) == 1
    wrong = {r["pattern"] for r in json.loads(out.read_text())["compared"] if r["ok"] is False}
    assert wrong == set(PATTERNS) - {"causal"}
    assert "WRONG" in capsys.readouterr().out


def test_what_is_not_begun_in_time_is_left_out(tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(out), "--seconds", "0"]) == 0
    assert json.loads(out.read_text())["compared"] == []
    assert "no time left: hidden, head dimension 100 not compared" in capsys.readouterr().out


def test_the_report_is_complete_after_each_row_and_errors_are_named(tmp_path, monkeypatch, capsys) -> None:
    out, real, seen = tmp_path / "report.json", check.compare, []
    monkeypatch.setattr(check_gpu, "HEAD_DIMS", (16,))

    def compare(names, device, dtype, shapes, patterns):
        seen.append(json.loads(out.read_text())["compared"])
        rows = iter(real(names, device, dtype, shapes, patterns))
        yield next(rows)
        if patterns == ("prefix",):
            raise RuntimeError("CUDA error:\nmisaligned address")
        yield from rows

    monkeypatch.setattr(check, "compare", compare)
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(out)]) == 1
    assert [len(rows) for rows in seen] == sorted({len(rows) for rows in seen}) and len(seen) == 2 * len(PATTERNS)
    report = json.loads(out.read_text())
    lines = capsys.readouterr().out.splitlines()
    name = "all, prefix, head dimension 16, bfloat16: WRONG, RuntimeError: CUDA error: misaligned address"
    assert name in lines and f"failed: {name}" in lines and name in report["failures"] and len(report["failures"]) == 2
    assert sum(r["ok"] is True for r in report["compared"]) == 14  # the others went on


def test_an_exact_row_and_numbers_that_are_not_finite() -> None:
    row = {"ok": True, "errors": {"output": 0.0, "dq": 0.5}, "allowed": [0.0, 1.0]}
    assert check_gpu.verdict(row) == "correct, error / allowed 0.50"
    assert check_gpu.verdict(row | {"ok": False, "allowed": [0.0, 0.0]}) == "WRONG, error / allowed inf"
    assert check_gpu._json_numbers({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": ["nan", 1.0], "b": "inf"}


def test_the_report_must_be_writable_before_anything_is_measured(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(tmp_path / "file" / "report.json")]) == 2
    assert "file is not a folder: name another place" in capsys.readouterr().err
    assert cli.main(["check-gpu", "--device", "cpu", "--out", str(tmp_path)]) == 2


def test_its_tests_have_a_time_limit(tmp_path, monkeypatch, capsys) -> None:
    tests = tmp_path / "tests" / "gpu"
    tests.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (tests / "test_x.py").write_text("import time, pytest\n@pytest.mark.gpu\ndef test_x(): time.sleep(300)\n")
    monkeypatch.setattr(check_gpu, "__file__", str(tmp_path / "megastar" / "commands" / "check_gpu.py"))
    assert cli.main(["check-gpu", "--tests", "--device", "cpu", "--seconds", "3"]) == 1
    assert "the tests did not end in 3 s" in capsys.readouterr().out
    (tests / "test_x.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_x(): pass\n")
    assert cli.main(["check-gpu", "--tests", "--device", "cpu"]) == 0


def test_its_tests_need_a_clone(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(check_gpu, "__file__", str(tmp_path / "megastar" / "commands" / "check_gpu.py"))
    assert cli.main(["check-gpu", "--tests", "--device", "cpu"]) == 2
    assert "check-gpu --tests needs a clone of the repository: " in capsys.readouterr().err


def test_peaks_are_the_data_sheets() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H200": 989,
        "NVIDIA GeForce RTX 4090": 165, "NVIDIA B200": 2250, "Tesla T4": None,
    }  # fmt: skip
    assert {name: gpus.peak_tflops(name) for name in names} == names


def test_the_table_takes_the_fastest_right_backend() -> None:
    def compared(name, d, ok):
        return {"backend": name, "head_dim": d, "ok": ok}

    def timed(name, pattern, ms, d=64, s=256):
        return {"backend": name, "pattern": pattern, "head_dim": d, "size": s, "ms": ms}

    right = [compared(name, d, True) for name in ("sdpa", "flex", "triton") for d in (64, 100)]
    rows = [
        timed("sdpa", "causal", 1.0), timed("triton", "causal", 1.1), timed("sdpa", "hidden", 3.0),
        timed("flex", "hidden", 1.4), timed("triton", "hidden", 1.2), timed("flex", "hidden", 9.0, s=1024),
        timed("triton", "hidden", 1.0, d=100), timed("sdpa", "hidden", 2.0, d=100),
        {"backend": "flash", "pattern": "hidden", "head_dim": 64, "size": 256, "why": "failed"},
    ]  # fmt: skip
    assert timing.fastest([*right, compared("triton", 100, False)], rows) == {
        "plain": {"64": {"256": "sdpa"}},
        "masked": {"64": {"256": "triton", "1024": "flex"}, "100": {"256": "sdpa"}},
    }
    assert timing.fastest([], rows) == {}  # nothing is known to be right


def test_timings_and_the_ratio_to_their_peer() -> None:
    rows = list(timing.timings(CPU, torch.float32, [(1, 1, 32, 16)], repeats=3))
    assert [(r["pattern"], r["backend"], r["peer"]) for r in rows] == [
        ("causal", "sdpa", "sdpa"),
        ("hidden", "sdpa", "sdpa"),
    ]
    assert all(r["ratio"] == r["ms"] / r["peer_ms"] > 0 for r in rows)
    late = list(timing.timings(CPU, torch.float32, [(1, 1, 32, 16)], repeats=1, over=lambda: True))
    assert [r["why"] for r in late] == ["skipped: no time left"] * 2
    dq, dk, dv = timing.forward_backward("sdpa", (1, 2, 16, 16), MaskSpec(), torch.float32, CPU)()
    assert dq.shape == dk.shape == dv.shape == (1, 2, 16, 16)


def measured(guided: bool) -> tuple[dict, dict]:
    """A step's row and its arithmetic. It joins a process group: in a process of its own."""
    from megastar.engine.step_benchmark import step_speed
    from megastar.engine.zero.process_group import start
    from megastar.parallel.cost import step_flops

    os.chdir(ROOT)
    model = ModelConfig(n_layer=2, n_head=2, dim=32, multiple_of=16, vocab_size=64, num_classes=3, image_tokens=16)
    cfg = RunConfig(
        model=model, self_guided=SelfGuidedConfig(enabled=guided, contrastive_block=1, projector_dim=16),
        parallel=ParallelConfig(deepspeed="configs/ds/zero1.json"), train=TrainConfig(dtype="fp32", steps=1, threads=1),
    )  # fmt: skip
    cfg.train.global_batch = 4
    return step_speed(cfg, start(cfg), images=4, steps=2, peak_tflops=1.0), step_flops(cfg)


def test_a_step_is_timed_and_split() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for guided in (False, True):
            row, flops = pool.submit(measured, guided).result(timeout=240)
            assert row["images_per_s"] == 4 / row["step_s"] and row["peak_gib"] is None and row["loss"] > 0
            assert row["mfu"] == pytest.approx(sum(row["mfu_parts"].values()))
            assert row["mfu"] == pytest.approx((flops["student"] + flops["teacher"]) / row["step_s"] / 1e12)
            assert (row["mfu_parts"]["teacher"] > 0) is guided and row["mfu_parts"]["heads"] > 0
