"""benchmarks/scale.py in its tiny mode: every part measures, and its counts are those of the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def test_the_tiny_mode_measures_every_part():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--tiny", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["data"][0]["shards"] == 100 and found["data"][0]["manifest MB"] > 0
    few, many = found["s3"]
    assert many["start, with a node cache"] > few["start, with a node cache"]
    assert few["start, a cache a rank"] > few["start, with a node cache"]  # a node fetches each shard once
    assert found["store"][0]["all read the digest s"] > 0 and found["store"][1]["ranks"] == "~16"
    for row in found["checkpoint"]:
        ranks = row["ranks"]
        assert row["files"] == 2 * ranks + 1
        assert (
            row["files opened to resume, all ranks"]
            < row["opened if every header is read"]
            == ranks * (ranks + row["files opened to resume, all ranks"] // ranks - 1)
        )
