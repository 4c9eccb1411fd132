"""Disks that fill, or turn read-only, below what a run writes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.disks import ROOT, with_disks


@pytest.mark.dist
def test_what_is_written_outlives_a_full_disk(tmp_path):
    with_disks({tmp_path / "disk": "8m"}, "-m", "tests.dist.workers.disk_worker", tmp_path / "disk")


def test_a_log_on_a_full_disk_is_no_error():
    code = """if True:
        import sys
        from megastar.commands._shared.common import FaultTolerantStream
        sys.stdout, sys.stderr = FaultTolerantStream(sys.stdout), FaultTolerantStream(sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            for _ in range(100):
                print("x" * 1000, file=stream, flush=True)
        """
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=full)
    assert done.returncode == 0
