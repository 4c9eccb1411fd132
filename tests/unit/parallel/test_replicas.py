"""Averages over ranks, with their gradients, and batch normalization over the global batch: that of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megastar.parallel.batch_norm import GlobalBatchNorm2d, use_global_batch
from megastar.parallel.replicas import Replicas, _buckets
from tests import forker

WORLD = 3


def test_one_process_returns_its_input():
    r, x = Replicas(), torch.rand(3, requires_grad=True)
    assert r.mean(x) is x and torch.equal(r.gather(x), x) and torch.equal(r.sum(x), x) and r.all_equal([x])
    assert r.part(4) == slice(0, 4)


def test_parts_are_in_rank_order_and_whole():
    assert [Replicas(r, 2).part(6) for r in range(2)] == [slice(0, 3), slice(3, 6)]
    with pytest.raises(AssertionError, match="7 rows on 2 ranks"):
        Replicas(0, 2).part(7)


def test_buckets_hold_every_gradient_once(monkeypatch):
    monkeypatch.setattr("megastar.parallel.replicas.BUCKET", 40)
    found = [torch.zeros(n) for n in (3, 4, 20, 1, 1)]
    found.insert(2, torch.zeros(2, dtype=torch.float64))
    buckets = list(_buckets(found))
    assert [id(g) for b in buckets for g in b] == [id(g) for g in found]
    assert [len(b) for b in buckets] == [2, 1, 1, 2] and list(_buckets([])) == []


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 2, 3),
        nn.BatchNorm2d(2, momentum=None),
    ]
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, x: torch.Tensor, r: Replicas) -> torch.Tensor:
    """With a statistic of the batch that is no mean over images: the entropy of the mean distribution."""
    y = model(x)
    p = r.mean(y.mean((2, 3)).softmax(1).mean(0))
    return y.square().mean() - (p * p.log()).sum()


@pytest.mark.dist
def test_three_ranks_equal_one_process(tmp_path):
    done = forker.run(["tests/unit/parallel/replicas_worker.py", str(tmp_path)], {"OMP_NUM_THREADS": "1"}, WORLD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("passed-*"))) == WORLD


def check_rank() -> None:
    """What each rank of ``test_three_ranks_equal_one_process`` does."""
    r = Replicas(dist.get_rank(), WORLD, dist.group.WORLD)
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = net()
    many = use_global_batch(copy.deepcopy(one), r)
    assert isinstance(many[1], GlobalBatchNorm2d) and one.state_dict().keys() == many.state_dict().keys()
    for _ in range(2):  # the second step uses what the first has left
        for model in (one, many):
            model.zero_grad()
        whole = loss_of(one, x, Replicas())
        whole.backward()
        mine = loss_of(many, x[r.part(6)], r)
        mine.backward()
        r.average_gradients(many.parameters())
        torch.testing.assert_close(r.sum(mine) / WORLD, whole.detach(), rtol=1e-12, atol=1e-12)
        for a, b in zip(one.parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-12)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(many.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(many.eval()(x), one.eval()(x))
    assert torch.equal(r.gather(x[r.part(6)]), x)
    assert r.all_equal(many.state_dict().values())
    other = torch.zeros(5)
    other[3] = float(r.rank == 2)
    assert not r.all_equal([x, other])
    r.from_main([other])
    assert r.all_equal([x, other])
