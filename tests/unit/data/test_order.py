"""Order and draws: pure, complete, uniform, pinned."""

import tracemalloc

import numpy as np
import pytest

from megastar.data.order import OrderSpec, permutation, sample_ids, slot_of
from megastar.data.views import draw_label_drop, draw_views
from tests.loaders import epoch_order

SPEC = OrderSpec(seed=3, shard_sizes=(7, 5, 0, 9, 4, 8), window=2)
N = SPEC.samples


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_each_epoch_has_every_sample_once(window):
    spec = OrderSpec(3, SPEC.shard_sizes, window)
    orders = [epoch_order(spec, e) for e in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(OrderSpec(4, SPEC.shard_sizes, window), 0))


def shards_of(spec: OrderSpec, order: np.ndarray) -> list[int]:
    return (np.searchsorted(np.cumsum(spec.shard_sizes), order, side="right")).tolist()


@pytest.mark.parametrize(("sizes", "window"), [(SPEC.shard_sizes, 2), ((40, 37, 0, 44, 41, 1, 39, 42), 3)])
def test_at_most_a_window_of_shards_is_open_and_they_are_mixed(sizes, window):
    spec = OrderSpec(3, sizes, window)
    slots = {}
    order = epoch_order(spec, 1)
    for place, shard in enumerate(shards_of(spec, order)):
        slots.setdefault(slot_of(spec, spec.samples + place), []).append(shard)
    assert [k for k, _ in enumerate(slots)] == [k for _, k in slots]  # slots follow each other
    assert all(epoch == 1 for epoch, _ in slots)
    first, last = {}, {}
    for (_, slot), shards in slots.items():
        assert len(set(shards)) <= window
        for shard in shards:
            first.setdefault(shard, slot)
            last[shard] = slot
    for shard in first:  # open for a window's length, however many samples it has
        assert last[shard] - first[shard] < window
    middle = list(slots.values())[len(slots) // 2]
    assert len(set(middle)) == window and sorted(middle) != middle


def test_the_first_batch_needs_one_shard_and_the_load_is_smooth():
    spec = OrderSpec(0, (1000,) * 50, 16)
    shards = shards_of(spec, epoch_order(spec, 0))
    assert len(set(shards[:62])) == 1
    seen: set[int] = set()
    news = []  # new shards in each stretch of a shard's length
    for first in range(0, 50_000, 1000):
        news.append(len(set(shards[first : first + 1000]) - seen))
        seen |= set(shards[first : first + 1000])
    assert max(news[8:]) <= 3 and sum(news) == 50


def test_a_set_of_a_billion_samples_costs_a_batch_what_it_touches():
    spec = OrderSpec(0, (10_000,) * 100_000, 16)
    tracemalloc.start()
    ids, epochs = sample_ids(spec, 3 * 10**9 + 123_456_789, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6 and len(set(ids.tolist())) == 512 and set(epochs.tolist()) == {3}
    assert len(set(shards_of(spec, ids))) == 16


def test_small_shards_are_mixed_too():
    """A shard of fewer samples than parts has them in any of its slots, not always in the last."""
    spec = OrderSpec(0, (1,) * 400, 8)
    places = np.argsort(shards_of(spec, epoch_order(spec, 0)))
    drawn = permutation(400, 0, 0, 0)
    moved = places[drawn] - np.arange(400)
    assert moved.std() > 1 and np.abs(moved).max() < 16


def test_steps_walk_the_epochs_without_a_gap():
    B = 10
    ids, epochs = zip(*(sample_ids(SPEC, step * B, B) for step in range(10)), strict=True)
    walked = np.concatenate(ids)
    expected = np.concatenate([epoch_order(SPEC, e) for e in range(-(-10 * B // N))])[: 10 * B]
    np.testing.assert_array_equal(walked, expected)
    np.testing.assert_array_equal(np.concatenate(epochs), np.arange(10 * B) // N)


def test_a_batch_may_span_several_epochs():
    ids, epochs = sample_ids(SPEC, 0, 3 * N)
    assert np.bincount(ids).tolist() == [3] * N and np.bincount(epochs).tolist() == [N] * 3


def test_order_is_pinned():
    """A changed order would break the resume of every run under way."""
    assert epoch_order(OrderSpec(0, (3, 2, 0, 4, 1), 2), 0).tolist() == [5, 6, 8, 3, 7, 4, 1, 2, 0, 9]
    assert epoch_order(OrderSpec(0, (4, 4), 2), 0).tolist() == [3, 2, 0, 1, 7, 5, 4, 6]
    ids = np.arange(4)
    assert draw_views(0, np.zeros(4, int), ids, 10, 2).tolist() == [[0, 3], [7, 5], [4, 3], [8, 7]]


def test_views_are_distinct_uniform_and_a_function_of_the_sample():
    ids = np.arange(20000)
    epochs = ids % 3
    views = draw_views(5, epochs, ids, 10, 2)
    assert views.shape == (20000, 2) and (views[:, 0] != views[:, 1]).all()
    pairs = np.bincount(views[:, 0] * 10 + views[:, 1], minlength=100).reshape(10, 10)
    off_diagonal = pairs[~np.eye(10, dtype=bool)]
    expected = 20000 / 90
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 150  # chi-square, 89 degrees of freedom: p < 1e-4
    chosen = np.array([7, 19999, 0])
    np.testing.assert_array_equal(draw_views(5, epochs[chosen], ids[chosen], 10, 2), views[chosen])
    assert (draw_views(5, epochs + 1, ids, 10, 2) != views).any(1).mean() > 0.9
    assert (draw_views(6, epochs, ids, 10, 2) != views).any(1).mean() > 0.9


def test_all_views_is_a_permutation():
    views = draw_views(1, np.zeros(50, int), np.arange(50), 4, 4)
    assert (np.sort(views, 1) == np.arange(4)).all()


def test_label_drop():
    ids = np.arange(50000)
    epochs = np.zeros_like(ids)
    dropped = draw_label_drop(2, epochs, ids, 0.1)
    assert abs(dropped.mean() - 0.1) < 4 * (0.1 * 0.9 / 50000) ** 0.5
    assert not draw_label_drop(2, epochs, ids, 0.0).any() and draw_label_drop(2, epochs, ids, 1.0).all()
    again = draw_label_drop(2, epochs + 1, ids, 0.1)
    assert abs((dropped & again).mean() - 0.01) < 0.003  # epochs are independent
    np.testing.assert_array_equal(draw_label_drop(2, epochs[:9], ids[:9], 0.1), dropped[:9])
    first_view = draw_views(2, epochs, ids, 10, 1)[:, 0]
    assert abs(dropped[first_view == 0].mean() - 0.1) < 0.02  # and independent of the views
