"""One data rank: what DeepSpeed's buckets would give, bit for bit, at stages 0 to 2, accumulated, with skipped steps."""

from __future__ import annotations

import pytest

from tests.dist.test_engine import launch


@pytest.mark.dist
def test_kept_gradients_are_those_of_the_buckets(tmp_path):
    launch(1, "tests/dist/workers/one_rank_worker.py", str(tmp_path))
    assert (tmp_path / "passed").read_text() == "5"
