"""Which matrices Muon takes, their owners, and the cost that the plan shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megastar.config.sections.optim import MuonConfig, OptimConfig, rate_warning
from megastar.parallel import budget, cost, muon
from megastar.parallel.gpus import GPUS, Machine
from megastar.parallel.plan import block_matrix
from tests.unit.parallel.test_budget import run_of, tiny, zeros

CFG = tiny()
SHAPES = budget.parameter_shapes(CFG.model, CFG.self_guided)


def test_muon_takes_the_matrices_of_the_blocks():
    taken = {n for n in SHAPES if block_matrix(n)}
    assert taken == {n for n, s in SHAPES.items() if ".layers." in n and len(s) == 2} and len(taken) == 5 * 3
    D, F = CFG.model.dim, CFG.model.ffn_dim
    apart, fused = muon.all_matrices(SHAPES, True), muon.all_matrices(SHAPES, False)
    assert [(m.rows, m.columns) for m in apart[:7]] == [(D, D)] * 4 + [(F, D)] * 2 + [(D, F)]
    assert [(m.rows, m.columns) for m in fused[:5]] == [(3 * D, D), (D, D), (F, D), (F, D), (D, F)]
    assert (
        sum(m.size for m in apart)
        == sum(m.size for m in fused)
        == budget.matrix_elements(budget.elements(CFG.model, CFG.self_guided))
    )


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_iterations_cost_what_is_counted(shape):
    with FlopCounterMode(display=False) as counted:
        torch.optim._muon._zeropower_via_newtonschulz(torch.randn(shape), (3.0, -4.0, 2.0), 5, 1e-7)
    assert muon.newton_schulz_flops(*shape, 5) == counted.get_total_flops()


@pytest.mark.parametrize("fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(12, 48), (48, 12)])
def test_the_rate_is_torchs(fn, shape):
    assert muon.lr_factor(fn, *shape) == torch.optim._muon._adjust_lr(1.0, fn, torch.Size(shape))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_owners_are_balanced(ranks):
    xl = muon.all_matrices(budget.parameter_shapes(run_of("xl").model), True)
    costs = [muon.newton_schulz_flops(m.rows, m.columns, 5) for m in xl]

    def loads(owners: list[int]) -> list[int]:
        return [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]

    plain = loads(muon.owners(costs, ranks))
    assert max(plain) <= max(sum(costs) / ranks + max(costs), max(costs))
    cuts = [
        min(ranks - 1, i * ranks // len(costs)) for i in range(len(costs))
    ]  # each is held by one rank, as at stage 1
    near = muon.owners(costs, ranks, [{rank: 5} for rank in cuts])
    assert max(loads(near)) <= (1 + muon.SLACK) * max(plain)
    assert sum(a == b for a, b in zip(near, cuts, strict=True)) >= len(costs) * (0.9 if ranks <= 8 else 0.5)


def test_plan_counts_muon():
    base, zero = run_of("xl"), zeros("zero1")
    with_muon = dataclasses.replace(base, optim=dataclasses.replace(base.optim, name="muon"))
    machine = Machine("h100", GPUS["h100"], 16, 8)
    for tensor in (1, 2):
        adamw, ours = (cost.make_plan(cfg, machine, zero, tensor, False, "bf16") for cfg in (base, with_muon))
        data = 16 // tensor
        elements = budget.matrix_elements(budget.elements(base.model, base.self_guided, tensor))
        assert adamw.memory["optimizer"] - ours.memory["optimizer"] == pytest.approx(4 * elements / data, rel=1e-6)
        assert ours.memory["ema"] == adamw.memory["ema"]
        assert adamw.newton_schulz == 0 < ours.newton_schulz < 0.1 * ours.seconds
        assert ours.optimizer == adamw.optimizer + ours.newton_schulz
        extra = ours.transfers[len(adamw.transfers) :]
        assert ours.transfers[: len(adamw.transfers)] == adamw.transfers
        assert [t.what for t in extra] == ["all-to-all momentum to owners", "all-to-all updates from owners"]
        assert extra[0].bytes == round(2 * elements * tensor / 16 * 15 / 16)
    assert "newton_schulz" not in cost.step_flops(base)
    assert cost.step_flops(with_muon)["newton_schulz"] == sum(
        muon.newton_schulz_flops(m.rows, m.columns, 5)
        for m in muon.all_matrices(budget.parameter_shapes(base.model), True)
    )
    alone = cost.make_plan(with_muon, Machine("h100", GPUS["h100"], 1, 1), zero, 1, False, "bf16")
    assert alone.transfers == []


def test_stage_0_sends_each_update_to_all_replicas():
    sent = muon.muon_traffic(SHAPES, MuonConfig(), tensor=1, data=4, replicated=True)
    size = budget.matrix_elements(budget.elements(CFG.model, CFG.self_guided))
    assert (sent.collect, sent.spread) == (0, size / 4 * 3)


def test_a_rate_of_the_other_size_is_warned_about():
    muons = OptimConfig(name="muon")
    assert rate_warning(muons, 0.02) == rate_warning(OptimConfig(), 1e-4) == ""
    assert "1e-04, which is of AdamW's size".replace("1e-04", "0.0001") in rate_warning(muons, 1e-4)
    matching = OptimConfig(name="muon", muon=MuonConfig(adjust_lr_fn="match_rms_adamw"))
    assert rate_warning(matching, 3e-4) == "" and "match_rms_adamw" in rate_warning(matching, 0.02)
