"""Hidden keys, mask forms, and attention against an explicit fp64 softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megastar.model.kernels import attention
from megastar.model.masks import MaskSpec, draw_hidden


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, dtype=torch.int64), torch.arange(n)


@pytest.mark.parametrize(("tokens", "ratio"), [(64, 0.25), (256, 0.25), (576, 0.25), (16, 0.5), (16, 0.0), (9, 1.0)])
def test_exactly_the_share_is_hidden_and_never_the_class(tokens: int, ratio: float) -> None:
    hidden = draw_hidden(5, *rows(20), tokens, ratio)
    assert hidden.shape == (20, tokens) and hidden.dtype == torch.bool
    assert hidden.sum(1).tolist() == [round(ratio * (tokens - 1))] * 20
    assert not hidden[:, 0].any()


def test_draw_is_a_function_of_seed_epoch_id_and_view_only() -> None:
    epochs, ids = torch.tensor([0, 0, 1, 2]), torch.tensor([7, 9, 7, 123456789])
    whole = draw_hidden(3, epochs, ids, 64, 0.25)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(draw_hidden(3, epochs[order], ids[order], 64, 0.25), whole[order])
    for b in range(4):  # one at a time, as another number of ranks would
        assert torch.equal(draw_hidden(3, epochs[b : b + 1], ids[b : b + 1], 64, 0.25)[0], whole[b])
    assert torch.equal(draw_hidden(3, epochs.numpy(), ids.numpy(), 64, 0.25), whole)
    for other in (
        draw_hidden(4, epochs, ids, 64, 0.25),
        draw_hidden(3, epochs + 1, ids, 64, 0.25),
        draw_hidden(3, epochs, ids + 1, 64, 0.25),
        draw_hidden(3, epochs, ids, 64, 0.25, view=1),
    ):
        assert not (other == whole).all(1).any()
    assert not torch.equal(whole[0], whole[2])  # same picture, another epoch


def test_draw_does_not_touch_the_global_generators() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    want = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    draw_hidden(0, *rows(4), 64, 0.25)
    assert torch.equal(torch.rand(1), want[0]) and np.random.rand() == want[1]


def test_every_token_is_hidden_equally_often() -> None:
    n, tokens = 4000, 17
    rate = draw_hidden(1, *rows(n), tokens, 0.25).float().mean(0)[1:]
    assert (rate - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5


def loop_mask(hidden: torch.Tensor) -> torch.Tensor:
    """Who sees whom, by definition: (B, S) -> (B, 1, S, S)."""
    batch, size = hidden.shape
    seen = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    for b in range(batch):
        for i in range(size):
            for j in range(i + 1):
                seen[b, 0, i, j] = i == j or not hidden[b, j]
    return seen


def test_dense_and_additive_forms() -> None:
    hidden = draw_hidden(0, *rows(3), 16, 0.25)
    mask = MaskSpec.hidden(hidden)
    assert mask.end is not None and mask.end.dtype == torch.int32 and not mask.is_plain_causal
    assert torch.equal(mask.dense(16, "cpu"), loop_mask(hidden))
    bias = mask.additive(16, "cpu", torch.float32)
    assert torch.equal(bias == 0, loop_mask(hidden)) and torch.equal(bias.isneginf(), ~loop_mask(hidden))
    assert mask.additive(16, "cpu", torch.float32) is bias  # built once, shared by all blocks

    plain = MaskSpec()
    assert plain.is_plain_causal
    assert torch.equal(plain.dense(16, "cpu"), torch.ones(16, 16).tril().bool()[None, None])


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """fp64 softmax over the keys a query sees."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = logits.exp() * seen
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("kind", ["none", "plain", "hidden"])
def test_attention_and_its_gradients(dtype: torch.dtype, tolerance: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 16, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    q[:, :, 0] = k[:, :, 0] = 0  # the class position
    hidden = draw_hidden(0, *rows(2), 16, 0.25) if kind == "hidden" else torch.zeros(2, 16, dtype=torch.bool)
    mask = {"none": None, "plain": MaskSpec(), "hidden": MaskSpec.hidden(hidden)}[kind]

    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    got = attention(*ours, mask)
    assert got.dtype == dtype
    theirs = [t.double().requires_grad_() for t in (q, k, v)]
    want = explicit(*theirs, loop_mask(hidden))
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    got.backward(g)
    want.backward(g.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3, 10])
def test_the_last_queries_of_a_longer_prefix(queries: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 10, 8, generator=generator).to(dtype) for _ in range(3))
    want = explicit(q, k, v, torch.ones(10, 10).tril().bool())[:, :, -queries:]
    got = attention(q[:, :, -queries:], k, v).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-2)
