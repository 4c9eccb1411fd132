"""The optimizer of Muon's runs without an engine: torch.optim.Muon's bits, its groups, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megastar.checkpoint.shard_format import KINDS, MUON_KINDS, kinds_of
from megastar.config.load import load_config
from megastar.config.sections.optim import MuonConfig, OptimConfig
from megastar.engine.checkpointer.load import _same_optimizer
from megastar.engine.context import Context
from megastar.engine.lr_schedule import learning_rate, muon_rate, rates_at
from megastar.engine.student import Student
from megastar.engine.zero import matrix_exchange
from megastar.engine.zero.muon import MuonEMA, newton_schulz, orthogonalize
from megastar.engine.zero.partitions import parameter_groups
from megastar.errors import UserError
from tests.dist.reference import STEPS, Matrices, config, is_matrix

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (5, 7)])
def test_the_iterations_are_torchs(shape):
    u, values, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = u * torch.linspace(1, 4, values.shape[-1]) @ v  # a random matrix may have singular values of almost 0
    theirs = [torch.optim._muon._zeropower_via_newtonschulz(m, COEFFICIENTS, 5, 1e-7) for m in matrices]
    assert torch.equal(orthogonalize(matrices.bfloat16(), 5, 1e-7), torch.stack(theirs))
    in_fp32 = orthogonalize(matrices, 5, 1e-7)
    torch.testing.assert_close(newton_schulz(matrices, 5, 1e-7), in_fp32, rtol=1e-4, atol=1e-5)  # a batch, as on a GPU
    values = torch.linalg.svdvals(in_fp32)
    assert (values > 0.5).all() and (values < 1.3).all()
    assert orthogonalize(torch.zeros(1, *shape), 5, 1e-7).count_nonzero() == 0


def test_groups_are_split():
    cfg = config()
    student = Student(cfg)
    names = {id(p): n for n, p in student.named_parameters()}
    groups = parameter_groups(student, 0.05, MuonConfig(weight_decay=0.3))
    found = {n for g in groups if g.get("muon") for n in (names[id(p)] for p in g["params"])}
    assert found == {n for n, p in student.named_parameters() if is_matrix(n, p)} and len(found) == 5 * 3
    assert [g["weight_decay"] for g in groups if g.get("muon")] == [0.3]
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    plain = parameter_groups(student, 0.05)
    assert len(plain) == 4 and not any("muon" in g for g in plain)


def attached(cfg, student) -> MuonEMA:
    o = cfg.optim
    optimizer = MuonEMA(parameter_groups(student, o.weight_decay, o.muon), o.muon, torch.float32, lr=o.lr, eps=o.eps)
    engine = SimpleNamespace(module=student, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    shapes = {n: list(p.shape) for n, p in student.named_parameters()}
    optimizer.attach(engine, Context(0, 1, torch.device("cpu"), torch.float32), shapes)
    return optimizer


@pytest.mark.parametrize("bucket", [1 << 25, 300])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nesterov": False, "split_qkv": False},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "momentum": 0.8, "weight_decay": 0.0},
    ],
)
def test_in_bf16_a_step_is_torchs_bit_for_bit(fields, bucket, monkeypatch):
    monkeypatch.setattr(matrix_exchange, "BUCKET", bucket)
    cfg = config(optim={"name": "muon", "muon": {"ns_dtype": "bf16", **fields}})
    torch.manual_seed(0)
    ours, theirs = Student(cfg), Student(cfg)
    theirs.load_state_dict(ours.state_dict())
    optimizer = attached(cfg, ours)
    reference = Matrices(cfg, theirs, [p for n, p in theirs.named_parameters() if is_matrix(n, p)])
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = muon_rate(cfg.optim, cfg.train.global_batch, step, STEPS) if group.get("muon") else 1e-3
            group["ema_decay"] = 0.5
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = {n: p.detach().clone() for n, p in ours.named_parameters()}
        average = {n: optimizer.prepare(p)["ema"].clone() for n, p in ours.named_parameters()}
        optimizer.step()
        reference.step(step)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert not torch.equal(a, before[name])
            assert not is_matrix(name, a) or torch.equal(a, b), name
            torch.testing.assert_close(optimizer.state[a]["ema"], 0.5 * average[name] + 0.5 * a.detach())
            wanted = {"step", "ema"} | ({"momentum_buffer"} if is_matrix(name, a) else {"exp_avg", "exp_avg_sq"})
            assert optimizer.state[a].keys() == wanted and optimizer.state[a]["step"] == step + 1


def test_what_a_checkpoint_stores():
    assert kinds_of("transformer.layers.2.attention.wqkv.weight", "muon") == MUON_KINDS
    for name in ("transformer.output.weight", "transformer.layers.0.ffn_norm.weight", "projector.w1.weight"):
        assert kinds_of(name, "muon") == KINDS
    assert kinds_of("transformer.layers.2.attention.wqkv.weight", "adamw") == KINDS


def test_rates_share_a_schedule():
    o = OptimConfig(name="muon", lr=1e-4, warmup_steps=4, schedule="cosine")
    for step in (0, 3, 50, 99):
        assert muon_rate(o, 64, step, 100) == pytest.approx(200 * learning_rate(o, 64, step, 100))
    assert rates_at(o, 256, 50, 100).keys() == {"lr", "lr_muon"} and rates_at(OptimConfig(), 256, 0, 9).keys() == {"lr"}


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="step-3 was trained with optim.name = adamw, this configuration sets muon"):
        _same_optimizer("adamw", "muon", tmp_path / "step-3")
    _same_optimizer("muon", "muon", tmp_path)
    given = ["data.shards=x"]
    for wrong, sentence in {
        "optim.name=sgd": "optim.name = sgd: must be adamw or muon",
        "optim.muon.adjust_lr_fn=rms": "optim.muon.adjust_lr_fn = rms: must be original or match_rms_adamw",
        "optim.muon.momentum=1": "optim.muon.momentum = 1.0: must be below 1",
        "optim.muon=0.02": "optim.muon = 0.02: is a section; write optim.muon.field: value",
        "optim.moun.lr=1": "unknown key optim.moun: did you mean optim.muon?",
    }.items():
        with pytest.raises(UserError) as error:
            load_config(None, [*given, "optim.name=muon", wrong])
        assert sentence in str(error.value)
    with pytest.raises(UserError, match="parallel.tensor_parallel = 5: must divide model.n_head 12"):
        load_config(None, [*given, "optim.name=muon", "parallel.tensor_parallel=5"])
