"""The gradient's norm and its clipping against those of DeepSpeed, in one process; over ranks: tests/dist/test_engine.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megastar.engine.zero import gradient_norm
from megastar.engine.zero.gradient_norm import GradientNorm, square_sums

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(gradient_norm.dist, "get_world_size", lambda: 1)


def zero_optimizer(groups: list[list[torch.Tensor]], clip_grad: float) -> SimpleNamespace:
    params = [[torch.zeros_like(g) for g in group] for group in groups]
    return SimpleNamespace(
        bit16_groups=params, params_in_partition=params, averaged_gradients=dict(enumerate(groups)),
        clip_grad=clip_grad, loss_scale=1.0, device=CPU, dp_process_group=None, model_parallel_group=None, model_parallel_rank=0,
    )  # fmt: skip


def of(zero: SimpleNamespace) -> GradientNorm:
    return GradientNorm(SimpleNamespace(optimizer=zero, device=CPU, mpu=None, zero_optimization_stage=lambda: 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 1e6])
def test_norm_and_clipping_are_deepspeeds(monkeypatch, dtype, clip_grad):
    monkeypatch.setattr("deepspeed.comm.all_reduce", lambda *a, **k: None)
    torch.manual_seed(0)
    groups = [[torch.randn(300, 700).to(dtype), torch.randn(5).to(dtype)], [torch.randn(70_001).to(dtype)]]
    zero = zero_optimizer(groups, clip_grad)
    norms = [
        DeepSpeedZeroOptimizer.get_grad_norm_direct.__get__(
            SimpleNamespace(**vars(zero), _model_parallel_all_reduce=lambda **k: None)
        )(groups[i], zero.params_in_partition[i])
        for i in range(2)
    ]
    want = combine_grad_norm_groups(norms)
    gradient = of(zero)
    got = gradient.partitions_norm()
    assert got.dtype == torch.float32 and torch.equal(got, want)
    mine, theirs = groups[1][0].float(), groups[1][0].float()
    gradient.clip_partition([mine], got)
    DeepSpeedZeroOptimizer.unscale_and_clip_grads(zero, [theirs], want)
    assert torch.equal(mine, theirs)
    assert (mine.norm() < 1) == (clip_grad == 0.5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite(bad):
    groups = [[torch.ones(3)], [torch.tensor([1.0, bad])]]
    assert not torch.isfinite(of(zero_optimizer(groups, 1.0)).partitions_norm())


def test_padding_and_a_group_without_gradients_count_as_zero():
    padding = torch.full((4,), 9.0)
    padding._zero_padding = True
    zero = zero_optimizer([[padding, torch.tensor([3.0, 4.0])], []], 0.0)
    zero.params_in_partition[0] = zero.params_in_partition[0][1:]
    assert of(zero).partitions_norm() == 5.0
    assert square_sums([[], []], CPU).tolist() == [0.0, 0.0]


def test_the_norms_of_rows_are_summed_in_fp64():
    torch.manual_seed(0)
    grad = torch.randn(2 << 20)
    exact = grad.double().square().sum()
    assert abs(square_sums([[grad]], CPU)[0] / exact - 1) < 1e-8  # torch's fp32 norm of the whole: 5e-4
