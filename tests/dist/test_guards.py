"""Two ranks: drifting replicas, different batches, corrupt replicas, skipped steps at every ZeRO stage."""

from __future__ import annotations

import pytest

from tests.dist.test_engine import launch


@pytest.mark.dist
def test_guards(tmp_path):
    launch(2, "tests/dist/workers/guards_worker.py", str(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("passed-*")) == ["passed-0", "passed-1"]
