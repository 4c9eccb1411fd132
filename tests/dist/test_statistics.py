"""Statistics and features that four ranks have gathered equal one process's to 1e-10."""

from __future__ import annotations

import pytest

from tests.dist.test_engine import launch


@pytest.mark.dist
def test_four_ranks_equal_one_process(tmp_path):
    launch(4, "tests/dist/workers/statistics_worker.py", str(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("passed-*")) == [f"passed-{r}" for r in range(4)]
