"""Gradients that replace those of DeepSpeed's buckets, bit for bit: one data rank at stages 0 to 2, two at stage 1."""

from __future__ import annotations

import pytest

from tests.dist.test_engine import launch


@pytest.mark.dist
def test_kept_gradients_are_those_of_the_buckets(tmp_path):
    launch(1, "tests/dist/workers/one_rank_worker.py", str(tmp_path))
    assert (tmp_path / "passed").read_text() == "5"


@pytest.mark.dist
def test_flat_gradients_of_two_ranks_are_those_of_the_buckets(tmp_path):
    """Halves of gradients are exact in fp32, so the sums are the same bits, with accumulation, skipped steps and NaN too."""
    launch(2, "tests/dist/workers/two_ranks_worker.py", str(tmp_path))
    assert (tmp_path / "passed").read_text() == "3"
