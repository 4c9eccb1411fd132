"""Masks against their definition by brute force, hidden keys, and attention against an explicit fp64 softmax."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megastar.errors import UserError
from megastar.model.kernels import attention
from megastar.model.masks import MaskSpec, Window, draw_hidden


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


def test_draws_of_released_runs_stay() -> None:
    """A fixed point of the draw: a change of it would change every run that is resumed."""
    stream = int.from_bytes(b"hidden", "big")
    for view, epoch, sample in [(0, 0, 0), (1, 3, 1_281_166), (0, 299, 2**40)]:
        rng = np.random.Generator(np.random.Philox(key=[11, stream], counter=[0, view, epoch, sample]))
        want = np.zeros(256, dtype=bool)
        want[1 + rng.permutation(255)[:64]] = True
        got = draw_hidden(11, np.array([5, epoch, 0]), np.array([1, sample, 2]), 256, 0.25, view=view)
        assert np.array_equal(got[1].numpy(), want)


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


# Any mask against its definition -----------------------------------------------------------------------------------
def by_definition(spec: MaskSpec, batch: int, size: int) -> torch.Tensor:
    """(batch, 1, S, S), pair by pair in plain Python."""

    def interval(t: torch.Tensor | None, b: int, otherwise: list[int]) -> list[int]:
        return otherwise if t is None else t[b if len(t) > 1 else 0].tolist()

    def near(i: int, j: int) -> bool:
        w = spec.window
        if w is None or i == 0 or j == 0:
            return True
        (ri, ci), (rj, cj) = divmod(i - 1, w.width), divmod(j - 1, w.width)
        return abs(ri - rj) <= w.rows and abs(ci - cj) <= w.columns

    seen = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    for b in range(batch):
        start, end = interval(spec.start, b, list(range(size))), interval(spec.end, b, [size] * size)
        for i in range(size):
            for j in range(size):
                seen[b, 0, i, j] = start[j] <= i < end[j] and near(i, j)
    return seen


@st.composite
def arguments(draw):
    """start, end (B or 1, S) or None, window or None, S: anything, also what must be refused."""
    size, rows = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2]))
    place = st.integers(-1, size + 1)
    intervals = st.lists(st.lists(place, min_size=size, max_size=size), min_size=rows, max_size=rows)
    start, end = draw(st.none() | intervals), draw(st.none() | intervals)
    window = draw(st.none() | st.builds(Window, st.integers(1, 5), st.integers(0, 3), st.integers(0, 3)))
    return (*(None if t is None else torch.tensor(t) for t in (start, end)), window, size)


@settings(max_examples=400, deadline=None)
@given(arguments())
def test_any_mask_follows_its_definition_or_is_rejected(drawn) -> None:
    start, end, window, size = drawn
    loose = MaskSpec(end, start, window, trusted=True)
    want = by_definition(loose, 2, size)
    blind = (~want.any(-1)).nonzero()
    if len(blind):
        with pytest.raises(UserError, match=rf"query {blind[0, 2]} of sequence {blind[0, 0]} sees no key"):
            MaskSpec(end, start, window)
        return
    spec = MaskSpec(end, start, window)
    got = spec.dense(size)
    assert torch.equal(got.expand(2, 1, size, size), want)
    assert torch.equal(spec.additive(size, "cpu", torch.float32) == 0, got)
    assert torch.equal(spec.rows(1).dense(size)[0], got[0])
    assert spec.is_plain_causal == (start is None and end is None and window is None)
    if spec.is_causal:
        assert not torch.triu(got, 1).any()
    mask = spec.flex(size, "cpu", block=4)
    i = torch.arange(size)
    seen = [mask.mask_mod(torch.tensor(b), torch.tensor(0), i[:, None], i) for b in range(2)]
    assert torch.equal(torch.stack(seen)[:, None], want)
    blocks = mask.to_dense()[0, 0].bool().repeat_interleave(4, 0).repeat_interleave(4, 1)[:size, :size]
    assert not (want & ~blocks).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_patterns_follow_their_definitions(data) -> None:
    """Each named pattern against one sentence of its own, pair by pair."""
    size, width = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, 4))
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    pairs = [(i, j) for i in range(size) for j in range(size)]

    def check(spec: MaskSpec, rule) -> None:
        got = spec.dense(size)[0, 0]
        assert all(bool(got[i, j]) == bool(rule(i, j)) for i, j in pairs)

    check(MaskSpec.causal(), lambda i, j: j <= i)
    hidden = torch.tensor([numbers]) == 0
    check(MaskSpec.hidden(hidden), lambda i, j: j == i or (j < i and not hidden[0, j]))
    check(MaskSpec.prefix(torch.tensor([n]), size), lambda i, j: j <= i or j < n)
    same = [[len(set(numbers[min(i, j) : max(i, j) + 1])) == 1 for j in range(size)] for i in range(size)]
    check(MaskSpec.documents(torch.tensor([numbers])), lambda i, j: j <= i and same[i][j])
    check(MaskSpec.sliding_window(size, n), lambda i, j: 0 <= i - j < n)

    def row(p: int) -> int:
        return (p - 1) // width

    def column(p: int) -> int:
        return (p - 1) % width

    check(
        MaskSpec.neighbourhood(width, n, n - 1),
        lambda i, j: j <= i and (j == 0 or (abs(row(i) - row(j)) <= n and abs(column(i) - column(j)) <= n - 1)),
    )
    check(MaskSpec.row_blocks(size, width, n), lambda i, j: j == 0 or (i > 0 and row(j) // n <= row(i) // n))


def test_a_mask_is_moved_and_built_once() -> None:
    spec = MaskSpec.hidden(draw_hidden(0, *rows(2), 16, 0.25))
    assert spec.to("cpu") is spec
    assert spec.to("meta") is spec.to("meta") and spec.to("meta").end.device.type == "meta"
    assert spec.flex(16, "cpu") is spec.flex(16, "cpu")
    with torch.inference_mode():  # what is first made while sampling must serve training
        bias = spec.additive(16, "cpu", torch.float64)
    assert not bias.is_inference()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MaskSpec(torch.tensor([[1, 0, 3]])), "query 1 of sequence 0 sees no key: set start <= 1 < end"),
        (lambda: MaskSpec(torch.ones(3)), "mask start and end: shapes [(3,)]; pass the same (B, S) for both"),
        (lambda: MaskSpec.sliding_window(8, 0), "sliding window of width 0 contains no key: use at least 1"),
        (lambda: MaskSpec.row_blocks(8, 4, 0), "blocks of 0 rows of 4 tokens are empty: use at least 1 of each"),
        (lambda: MaskSpec.neighbourhood(0, 1, 1), "the width must be at least 1, rows and columns at least 0"),
        (
            lambda: MaskSpec.hidden(torch.zeros(4, dtype=torch.bool)),
            "mask from a tensor of shape (4,): pass (B, S) with S of at least 1",
        ),
        (lambda: MaskSpec.prefix(torch.tensor(3), 8), "prefix: lengths of shape (), size 8; pass (B,) and at least 1"),
        (lambda: MaskSpec.sliding_window(8, 2).dense(16), "mask for 8 positions, but the sequence has 16"),
    ],
)
def test_user_errors(make, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        make()


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """fp64 softmax over the keys a query sees."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    weights = logits.exp() * seen
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("kind", ["none", "plain", "hidden", "prefix", "window"])
def test_attention_and_its_gradients(dtype: torch.dtype, tolerance: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 16, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    q[:, :, 0] = k[:, :, 0] = 0  # the class position
    hidden = draw_hidden(0, *rows(2), 16, 0.25) if kind == "hidden" else torch.zeros(2, 16, dtype=torch.bool)
    mask = {
        "none": None,
        "plain": MaskSpec(),
        "hidden": MaskSpec.hidden(hidden),
        "prefix": MaskSpec.prefix(torch.tensor([3, 9]), 16),
        "window": MaskSpec.neighbourhood(4, 1, 1),
    }[kind]

    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    got = attention(*ours, mask)
    assert got.dtype == dtype
    theirs = [t.double().requires_grad_() for t in (q, k, v)]
    want = explicit(*theirs, by_definition(mask or MaskSpec(), 2, 16))
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
