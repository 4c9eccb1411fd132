"""The planned memory of a run against that of its GPU, and precisions that a GPU lacks: one sentence each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megastar.config.load import load_config
from megastar.engine.context import Context
from megastar.engine.memory_check import check_run, planned_bytes
from megastar.errors import UserError
from megastar.utils.device import pick_dtype

WORDS = ["data.shards=none", "data.val_shards=", "data.tokenizer="]
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the memory in GiB of a GPU that is not there."""

    def install(gib: float) -> None:
        properties = SimpleNamespace(name="Tesla T4", total_memory=gib * 2**30, major=7, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return install


def test_a_gpu_that_cannot_hold_the_states_is_refused(gpu, caplog) -> None:
    cfg = load_config("configs/run/star_xl_50ep.yaml", [*WORDS, "train.global_batch=32"])
    ctx = Context(0, 1, GPU, torch.bfloat16)
    states, peak = (value / 2**30 for value in planned_bytes(cfg, 1, "bf16")[:2])
    assert 10 < states < peak
    gpu(states - 1)
    with pytest.raises(
        UserError, match="Tesla T4 has .* GiB: use more GPUs or another ZeRO stage; megastar plan"
    ) as error:
        check_run(cfg, ctx)
    assert f"need {states:.1f} GiB" in str(error.value) and "\n" not in str(error.value)
    assert caplog.messages == []
    gpu((states + peak) / 2)
    assert check_run(cfg, ctx) is ctx
    (message,) = caplog.messages
    assert f"{peak:.1f} GiB" in message and "zero1" in message and "32 images" in message and "megastar plan" in message
    caplog.clear()
    gpu(peak + 1)
    check_run(cfg, ctx)
    assert caplog.messages == []


def test_an_evaluation_that_needs_more_than_the_gpu_has(gpu, caplog) -> None:
    words = [
        "data.tokenizer=assets/tokenizer/emoji64-vq.safetensors",
        "eval.every=10",
        "eval.samples=2000",
        "eval.batch=1024",
    ]
    cfg = load_config("configs/run/demo.yaml", words)
    ctx = Context(0, 1, GPU, torch.bfloat16)
    _, peak, evaluating = (value / 2**30 for value in planned_bytes(cfg, 1, "bf16"))
    assert evaluating > peak
    gpu((peak + evaluating) / 2)
    check_run(cfg, ctx)
    (message,) = caplog.messages
    assert f"{evaluating:.1f} GiB" in message and "1024 images" in message and "lower eval.batch" in message
    caplog.clear()
    cfg.eval.batch = 4096  # of which 2000 are sampled
    gpu(2 * evaluating)
    check_run(cfg, ctx)
    cfg.eval.every = 0
    assert caplog.messages == [] and planned_bytes(cfg, 1, "bf16")[2] == 0


def test_the_batch_is_checked_on_a_cpu_too() -> None:
    cfg = load_config("configs/run/star_b_50ep.yaml", WORDS)
    with pytest.raises(UserError, match="world size 3 does not divide"):
        check_run(cfg, Context(0, 3, torch.device("cpu"), torch.float32))


def test_precisions_that_the_gpu_lacks(gpu, monkeypatch) -> None:
    gpu(16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=r"bf16: Tesla T4 \(compute capability 7.5\) lacks it; use fp32 or auto"):
        pick_dtype("bf16", GPU)
    assert pick_dtype("auto", GPU) == torch.float32
    with pytest.raises(UserError, match="train.dtype = fp16: must be bf16, fp32 or auto"):
        load_config("configs/run/star_b_50ep.yaml", [*WORDS, "train.dtype=fp16"])
