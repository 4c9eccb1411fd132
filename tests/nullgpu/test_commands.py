"""Every command that uses a GPU, on the null GPU (null_cuda.c): make test-nullgpu.

Torch's CUDA build, its allocator, streams and graph capture, DeepSpeed's CUDA accelerator, inductor, Triton and ptxas are
real; results of kernels are not, so losses mean nothing and steps may be skipped. Each command must end as on a CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nullgpu import device

pytestmark = pytest.mark.nullgpu
ROOT = Path(__file__).resolve().parents[2]
IMAGES, TOKENIZER = "assets/emoji64/emoji64.tar", "assets/tokenizer/emoji64-vq.safetensors"
SMALL = (
    "model.n_layer=2", "model.dim=64", "model.n_head=2", "self_guided.contrastive_block=1", "self_guided.projector_dim=64",
    "train.global_batch=8", "train.val_images=16", "train.log_every=2", "train.steps=6", "train.save_every=3",
    "train.val_every=3", "faults.max_skips=1000",
)  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nullgpu")


def run(folder: Path, *words: object, limit: float = 600, gpu: bool = True) -> str:
    """The output of ``megastar WORDS``, which must end with status 0 and write no traceback."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):  # set by tests/conftest.py, or by the caller
        env.pop(name, None)
    if gpu:
        env |= (
            device.environment() | {"NULLGPU_FINITE": "1"} | {"PYTHONPATH": f"{device.HERE / 'site'}{os.pathsep}{ROOT}"}
        )
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "megastar", *map(str, words)], cwd=ROOT, env=env, timeout=limit, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Traceback" not in done.stdout and "null GPU:" not in done.stdout, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def shards(folder: Path) -> Path:
    out = folder / "codes"
    run(
        folder,
        "pretokenize",
        IMAGES,
        "--subset",
        "val",
        "--tokenizer",
        TOKENIZER,
        "--out",
        out,
        "--crops",
        "center-flip",
        gpu=False,
    )
    return out


def train(folder: Path, shards: Path, name: str, *more: str) -> tuple[Path, str]:
    run_dir = folder / name
    words = ("train", "configs/run/demo.yaml", f"run={run_dir}", f"data.shards={shards}", f"data.val_shards={shards}")
    text = run(folder, *words, *SMALL, *more)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] in (6, 9) and any("memory_gib" in row for row in rows)
    started = json.loads((run_dir / "events.jsonl").read_text().splitlines()[0])
    assert started["event"] == "started" and started["device"] == "NVIDIA H200"
    return run_dir, text


@pytest.fixture(scope="session")
def trained(folder: Path, shards: Path) -> Path:
    return train(folder, shards, "trained", "parallel.deepspeed=zero1")[0]


CASES = {
    "zero1-star": ("parallel.deepspeed=zero1",),
    "zero1-ar": ("parallel.deepspeed=zero1", "self_guided.enabled=false"),
    "zero1-fp32": ("parallel.deepspeed=zero1", "train.dtype=fp32"),
    "zero1-accumulation": ("parallel.deepspeed=zero1", "train.micro_batch=4"),
    "zero1-triton": ("parallel.deepspeed=zero1", "attention.backend=triton"),
    "zero1-sdpa": ("parallel.deepspeed=zero1", "attention.backend=sdpa"),
    "zero1-unfused": ("parallel.deepspeed=zero1", "train.fused_ops=off"),
    "zero2": ("parallel.deepspeed=zero2",),
    "zero3": ("parallel.deepspeed=zero3",),
    "zero3-checkpointing": ("parallel.deepspeed=zero3", "parallel.activation_checkpointing=true"),
    "zero3-ar": ("parallel.deepspeed=zero3", "self_guided.enabled=false"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_validates_and_saves(folder: Path, shards: Path, name: str) -> None:
    run_dir, text = train(folder, shards, name, *CASES[name])
    assert (run_dir / "checkpoints").is_dir()
    for warning in ("destroy_process_group", "device_id", "barrier()"):  # of torch, about the process group
        assert warning not in text, text[-3000:]


def test_a_deterministic_run_is_scored_while_it_trains(folder: Path, shards: Path) -> None:
    """Drawing a token uses an operation that torch refuses in such a run."""
    words = ("parallel.deepspeed=zero1", "train.deterministic=true", "eval.every=3", "eval.samples=8", "eval.batch=4")
    run_dir, text = train(folder, shards, "deterministic", *words, "eval.against_images=16")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "evaluated" for e in events) == 2, text[-3000:]


def test_features_are_computed_while_a_run_trains(folder: Path, shards: Path) -> None:
    words = (
        "method=configs/method/repa.yaml",
        "repa.online=true",
        "repa.encoder=efflite0",
        "data.val_shards=",
        f"repa.pictures={IMAGES}",
        "repa.block=1",
    )
    train(folder, shards, "online", "parallel.deepspeed=zero1", *words)


def test_offload_to_the_host(folder: Path, shards: Path) -> None:
    train(folder, shards, "offload", "parallel.deepspeed=zero3_offload")


def test_a_run_resumes(folder: Path, shards: Path) -> None:
    run_dir, _ = train(folder, shards, "resumed", "parallel.deepspeed=zero1")
    _, text = train(folder, shards, "resumed", "parallel.deepspeed=zero1", "train.steps=9")
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert "resumed" in events, (events, text)


def test_sampling_evaluation_and_report(folder: Path, trained: Path) -> None:
    run(folder, "sample", trained, "--per-class", 1, "--out", folder / "samples.png")
    run(folder, "report", trained, "--out", folder / "report.html")
    run(folder, "convert", trained, "--to", "safetensors", "--out", folder / "weights.safetensors")
    assert all((folder / name).stat().st_size for name in ("samples.png", "report.html", "weights.safetensors"))


def test_linear_probe(folder: Path, shards: Path, trained: Path) -> None:
    run(folder, "probe", trained, "--block", 1, "--epochs", 1, "--val-shards", shards, "--limit", 64)


def test_doctor(folder: Path) -> None:
    assert "NVIDIA H200" in run(folder, "doctor")


def test_check_gpu_ends_in_time(folder: Path) -> None:
    out = folder / "check-gpu.json"
    run(folder, "check-gpu", "--seconds", 60, "--no-steps", "--out", out)
    assert json.loads(out.read_text())["device"]["name"] == "NVIDIA H200"
