"""Order and draws: pure, complete, uniform, pinned."""

import numpy as np
import pytest

from megastar.data.order import OrderSpec, batch_ids, epoch_order
from megastar.data.views import draw_label_drop, draw_views

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


def test_only_one_window_of_shards_is_open_at_a_time():
    starts = np.concatenate([[0], np.cumsum(SPEC.shard_sizes)])
    shard_of = np.searchsorted(starts, epoch_order(SPEC, 0), side="right") - 1
    first, last = {}, {}
    for place, shard in enumerate(shard_of.tolist()):
        first.setdefault(shard, place)
        last[shard] = place
    for place in range(N):
        assert sum(first[s] <= place <= last[s] for s in first) <= SPEC.window
    assert len(set(shard_of[: sum(sorted(SPEC.shard_sizes)[:2])].tolist())) > 1  # and they are mixed


def test_steps_walk_the_epochs_without_a_gap():
    B = 10
    ids, epochs = zip(*(batch_ids(SPEC, step, B) for step in range(10)), strict=True)
    walked = np.concatenate(ids)
    expected = np.concatenate([epoch_order(SPEC, e) for e in range(-(-10 * B // N))])[: 10 * B]
    np.testing.assert_array_equal(walked, expected)
    np.testing.assert_array_equal(np.concatenate(epochs), np.arange(10 * B) // N)


def test_a_batch_may_span_several_epochs():
    ids, epochs = batch_ids(SPEC, 0, 3 * N)
    assert np.bincount(ids).tolist() == [3] * N and np.bincount(epochs).tolist() == [N] * 3


def test_order_is_pinned():
    """A changed order would break the resume of every run under way."""
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
