"""Loss spikes against the definition of the z-score; which rank is at fault among replicas."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from megastar.config.schema import FaultsConfig
from megastar.engine.context import Context
from megastar.engine.fault_tolerance import replica_checksum
from megastar.engine.fault_tolerance.loss_spikes import MIN_SIGMA, SpikeTest
from megastar.engine.fault_tolerance.replica_checksum import find_outliers
from megastar.engine.fault_tolerance.skip_policy import SkipPolicy
from megastar.run_dir.jsonl import read_jsonl


def brute_force(losses: list[float], loss: float, sigma: float, window: int) -> bool:
    """From the whole history."""
    last = losses[-window:]
    if not sigma or len(last) < max(2, window // 2):
        return False
    deviation = max(statistics.stdev(last), MIN_SIGMA * abs(statistics.fmean(last)))
    return (loss - statistics.fmean(last)) / deviation > sigma


@pytest.mark.parametrize(("sigma", "window"), [(6.0, 128), (2.0, 16), (3.0, 2), (0.0, 16)])
def test_spikes_are_those_of_the_definition(sigma, window):
    rng = np.random.default_rng(window)
    test, accepted, found = SpikeTest(sigma, window), [], 0
    for step in range(500):
        noise = rng.normal() * 0.05 * (1 + 20 * (rng.random() < 0.03))
        loss = 6 + 3 * math.exp(-step / 60) + noise
        spike = bool(test.check(loss))
        assert spike == brute_force(accepted, loss, sigma, window), step
        found += spike
        if not spike:  # a skipped one leaves the window alone
            accepted.append(loss)
            test.add(loss)
    assert (found > 0) == (sigma > 0)


def test_a_ripple_on_a_plateau_and_a_drop_are_not_spikes():
    test = SpikeTest(6.0, 8, [7.0] * 8)
    assert not test.check(7.0 * (1 + 5.9 * MIN_SIGMA)) and not test.check(1.0)
    assert test.check(7.0 * (1 + 6.1 * MIN_SIGMA)) == "loss 7.2135 is 6.1 sigma above 7"


def test_early_training_is_not_a_spike():
    """A loss that falls steeply after a flat warm-up, with a contrastive part whose positions change each step."""
    rng = np.random.default_rng(0)
    test = SpikeTest(6.0, 128)
    for step in range(400):
        loss = 9.7 - 3 / (1 + math.exp((60 - step) / 15)) - 0.002 * step + rng.normal() * 0.15
        assert not test.check(loss), step
        test.add(loss)


def test_the_skip_policy_resumes_from_its_state():
    """After any restore it makes the same decisions."""
    faults = FaultsConfig(spike_window=8, max_skips=2)
    guard = SkipPolicy(faults)
    for step in range(20):
        guard.spikes.add(5 + 0.1 * (step % 3))
    assert [guard.skip(s) for s in (4, 6, 13, 14)] == [False, False, False, False]  # 6 is 8 steps before 14
    assert guard.skip(15)  # 13, 14 and 15
    guard.offset = 7
    state = guard.state(16)
    other = SkipPolicy(faults)
    other.restore({"guard": state, "step": 16})
    assert other.state(16) == state and state["skips"] == [13, 14, 15] and len(state["losses"]) == 8
    other.restore({"guard": state, "step": 16}, rollbacks=1, position=40)  # it was saved before the roll-back
    assert (other.rollbacks, other.offset, other.skips) == (1, 24, [])
    assert other.state(16)["losses"] == state["losses"]
    other.restore({"guard": other.state(18), "step": 18}, rollbacks=1, position=40)  # and this one after it
    assert (other.rollbacks, other.offset) == (1, 24)
    other.restore({"step": 3})  # a checkpoint of a version without this state
    assert other.state(3) == {"losses": [], "skips": [], "rollbacks": 0, "offset": 0}
    assert SkipPolicy(FaultsConfig(max_skips=0)).skip(0)


def test_the_rank_at_fault():
    assert find_outliers([1, 1, 1, 1], [[0, 1, 2, 3]]) is None
    assert find_outliers([1, 1, 2, 1], [[0, 1, 2, 3]]) == ([2], True)
    assert find_outliers([1, 2], [[0, 1]]) == ([0, 1], False)
    assert find_outliers([1, 2, 1, 2, 1, 3], [[0, 2, 4], [1, 3, 5]]) == (
        [5],
        True,
    )  # two tensor ranks, three data ranks
    assert find_outliers([1, 1, 2, 2], [[0, 1, 2, 3]]) == ([0, 1, 2, 3], False)
    assert find_outliers([False, True, False, False], [[0, 1], [2, 3]]) == ([0, 1], False)


def test_a_rank_that_differs_from_a_majority_is_recorded(tmp_path):
    ctx = Context(0, 3, torch.device("cpu"), torch.float32)
    hosts = ["n0", "n0", "n1"]
    certain, not_certain = ("norm.weight", [2], True, hosts), ("w1.weight", [0, 2], False, hosts)
    assert "differs between rank 2 (n1), and no majority" in replica_checksum.report(
        tmp_path, ctx, 7, [certain, not_certain]
    )
    assert not (tmp_path / "lost.jsonl").exists()
    text = replica_checksum.report(tmp_path, ctx, 7, [certain])
    assert text.startswith("step 7: norm.weight must be equal") and "on rank 2 (n1) alone" in text
    (line,) = read_jsonl(tmp_path / "lost.jsonl")
    assert (line["rank"], line["host"], line["why"], line["attempt"]) == (2, "n1", "corrupt", 0)
