"""The comparison of compiled and eager blocks that train.compile=auto makes, with a compiler that generates nothing."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from megastar.config.schema import ModelConfig, RunConfig, TrainConfig
from megastar.engine.context import Context
from megastar.engine.zero import compiled_blocks
from megastar.model.transformer import Transformer, TransformerBlock
from megastar.utils.logs import ROOT

SMALL = ModelConfig(n_layer=4, n_head=2, dim=32, multiple_of=32, vocab_size=128, num_classes=9, image_tokens=16)
COMPILE = torch.compile


def run(compile: str = "auto") -> RunConfig:
    return RunConfig(model=SMALL, train=TrainConfig(compile=compile))


def context(dtype: torch.dtype = torch.float32, tensor: int = 1) -> Context:
    return Context(0, 1, torch.device("cpu"), dtype, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_agree_and_have_no_graph_break(monkeypatch, dtype: torch.dtype) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="aot_eager"))
    counters.clear()
    before = torch.get_rng_state()
    assert compiled_blocks._problem(run(), context(dtype), masked=True) == (None, 0)
    assert compiled_blocks.compilations() == 1  # two blocks, two masks
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("compiled", "problem"),
    [
        (lambda f, **_: lambda self, x, **k: f(self, x, **k) * 1.01, "differ from eager ones (output of step 1 off by"),
        (lambda f, **_: 1 / 0, "failed (ZeroDivisionError: division by zero)"),
    ],
)
def test_wrong_compiled_blocks_are_found(monkeypatch, compiled, problem: str) -> None:
    monkeypatch.setattr(torch, "compile", compiled)
    found, _ = compiled_blocks._problem(run(), context(), masked=False)
    assert found is not None and found.startswith(problem)


def test_when_blocks_are_compiled(monkeypatch, caplog) -> None:
    monkeypatch.setattr(ROOT, "propagate", True)
    assert compiled_blocks.wants_compiled(run("on"), context(), True)
    assert not compiled_blocks.wants_compiled(run("off"), context(), True)
    assert not compiled_blocks.wants_compiled(run(), context(), True)  # on a CPU
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), tensor=2)
    assert not compiled_blocks.wants_compiled(run(), gpu, True)  # with tensor parallelism
    assert not caplog.messages
    monkeypatch.setattr(compiled_blocks, "_problem", lambda *_: ("differ from eager ones", 0))
    monkeypatch.setattr(torch, "tensor", lambda value, device: value)
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), tensor=1, world=1, main=True)
    assert not compiled_blocks.wants_compiled(run(), gpu, True)
    assert caplog.messages[0].startswith("train.compile: compiled blocks differ from eager ones; blocks run eagerly")


def test_the_weights_keep_their_names_and_hooks_run_outside_of_the_graph(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    network = Transformer(SMALL)
    names = list(network.state_dict())
    compiled_blocks.compile_blocks(network)
    assert list(network.state_dict()) == names
    calls: list[bool] = []
    network.layers[0].register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    assert isinstance(network.layers[0], TransformerBlock)
    network(torch.zeros(2, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long))
    assert calls == [False]
