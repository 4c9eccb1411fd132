"""Which rank is slow, from each rank's own measurements."""

from __future__ import annotations

import pytest

from megastar.engine.fault_tolerance.stragglers import ROWS, Place, StragglerTracker, compare_ranks

NODES = [Place("a", 0), Place("a", 1), Place("b", 0), Place("b", 1)]


def on_cpu(*host: float, wait: tuple[float, ...] | None = None) -> list[list[float]]:
    return [[h, 0.0, w] for h, w in zip(host, wait or (0.0,) * len(host), strict=True)]


def test_a_rank_is_compared_with_the_others():
    report = compare_ranks(on_cpu(1.0, 1.1, 3.0, 0.9), 3.0)
    assert report.own == [1.0, 1.1, 3.0, 0.9] and report.data == [False] * 4
    assert report.ratios == pytest.approx([1.0 / 1.1, 1.1, 3.0, 0.9 / 1.1])
    assert compare_ranks(on_cpu(1.0, 3.0), 3.0).ratios == pytest.approx([1 / 3, 3.0])  # of two: with the other one
    assert compare_ranks(on_cpu(0.0, 0.0), 1.0).ratios == [1.0, 1.0]


def test_waiting_for_data_is_distinguished_from_computing():
    report = compare_ranks(on_cpu(1.0, 1.0, 1.1, 1.0, wait=(0.0, 0.0, 2.0, 0.1)), 3.0)
    assert report.ratios[2] == pytest.approx(3.1) and report.data == [False, False, True, True]


def test_on_a_gpu_the_parts_time_scales_the_step():
    # (host, part on the GPU, wait): rank 1's GPU takes twice as long for the same part, and sets the pace.
    report = compare_ranks([[0.01, 0.001, 0.0], [0.01, 0.002, 0.0], [0.01, 0.001, 0.0]], 1.0)
    assert report.own == pytest.approx([0.5, 1.0, 0.5]) and report.ratios[1] == pytest.approx(2.0)
    # A host that launches slowly holds up its GPU by that time.
    report = compare_ranks([[0.01, 0.001, 0.0], [0.51, 0.001, 0.0], [0.01, 0.001, 0.0]], 1.0)
    assert report.own == pytest.approx([1.0, 1.5, 1.0])


def test_one_slow_row_is_not_reported_and_each_host_is_reported_once():
    tracker, slow, normal = (
        StragglerTracker(NODES, 1.5),
        compare_ranks(on_cpu(1, 1, 2, 1), 2),
        compare_ranks(on_cpu(1, 1, 1, 1), 1),
    )
    for _ in range(3):
        assert not any(tracker.update(v) for v in [slow] * (ROWS - 1) + [normal])
    events = [news for _ in range(3 * ROWS) for news in tracker.update(slow)]
    ((text, more),) = events
    assert text.startswith("rank 2 on b (GPU 0) computes slowly: 2 s per step, 2 times the others'")
    assert "run megastar doctor on b; if that does not help, exclude it" in text
    expected = {"situation": "slow b", "rank": 2, "slow_host": "b", "gpu": 0, "why": "compute", "ratio": 2.0}
    assert more == expected
    both = compare_ranks(on_cpu(1, 1, 2, 2), 2)
    assert not any(tracker.update(both) for _ in range(2 * ROWS))  # the same host
    assert not any(tracker.update(normal) for _ in range(ROWS - 1))
    assert tracker.update(normal) == [("b is as fast as the others again", {"situation": "slow b", "over": True})]
    waits = compare_ranks(on_cpu(1, 1, 1, 1, wait=(3, 0, 0, 0)), 4)
    ((text, more),) = [news for _ in range(ROWS) for news in tracker.update(waits)]
    assert "rank 0 on a (GPU 0) waits for its data" in text and more["why"] == "data"


def test_a_ratio_of_zero_reports_nothing():
    tracker = StragglerTracker(NODES, 0.0)
    assert not any(tracker.update(compare_ranks(on_cpu(1, 1, 9, 1), 9)) for _ in range(3 * ROWS))
