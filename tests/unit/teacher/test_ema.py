"""The teacher's average against its recursion, and the decay's schedule."""

from __future__ import annotations

import pytest
import torch

from megastar.config.schema import SelfGuidedConfig
from megastar.teacher.ema import lerp_
from megastar.teacher.schedule import decay_at


def test_lerp_follows_the_recursion() -> None:
    generator = torch.Generator().manual_seed(0)
    averages = [torch.randn(s, generator=generator) for s in ((3, 4), (7,), (0,))]
    exact = [a.double() for a in averages]
    kept = [a.data_ptr() for a in averages]
    for step in range(300):
        values = [torch.randn(a.shape, generator=generator) for a in averages]
        decay = min(0.99, (1 + step) / (10 + step))
        lerp_(averages, values, decay)
        exact = [decay * e + (1 - decay) * v.double() for e, v in zip(exact, values, strict=True)]
    assert [a.data_ptr() for a in averages] == kept  # in place
    for a, e in zip(averages, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)


def test_lerp_moves_by_a_small_step_and_needs_no_gradient() -> None:
    average, value = torch.ones(4), torch.zeros(4, requires_grad=True)
    lerp_([average], [value], 0.9999)
    torch.testing.assert_close(average, torch.full((4,), 0.9999))
    assert not average.requires_grad
    lerp_([], [], 0.9)
    with pytest.raises(AssertionError, match="full precision"):
        lerp_([torch.ones(4, dtype=torch.bfloat16)], [torch.zeros(4, dtype=torch.bfloat16)], 0.9999)


def test_decay_schedule() -> None:
    constant = SelfGuidedConfig()
    assert [decay_at(t, constant) for t in (0, 10, 10**6)] == [0.9999] * 3
    warm = SelfGuidedConfig(teacher_warmup=True, teacher_decay=0.99)
    assert [decay_at(t, warm) for t in (0, 8, 90)] == [pytest.approx(x) for x in (1 / 10, 9 / 18, 91 / 100)]
    assert decay_at(10**5, warm) == 0.99
