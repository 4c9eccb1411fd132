"""benchmarks/step.py in its tiny mode, against a stand-in for LlamaGen's gpt.py: unequal work is not timed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import forker
from tests.stand_in.llamagen import write_checkout

ROOT = Path(__file__).resolve().parents[2]


def bench(tmp_path: Path, *words: str, work: str = "pass") -> subprocess.CompletedProcess:
    write_checkout(tmp_path, work=work)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LLAMAGEN_DIR": str(tmp_path)}
    return forker.run([str(ROOT / "benchmarks/step.py"), "--tiny", *words], environment, timeout=300)


@pytest.mark.parametrize(("level", "dtype"), [("model", "fp32"), ("engine", "bf16")])
def test_equal_work_is_timed(tmp_path, level, dtype):
    done = bench(tmp_path, "--level", level, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert "first step without dropout: sequences x tokens (2, 63)" in done.stdout
    assert re.search(r"LlamaGen / megastar = \d+\.\d\d", done.stdout)


def test_more_work_on_one_side_is_not_timed(tmp_path):
    """As the engine did with two views of an image where LlamaGen had one; equal losses do not hide it."""
    double = "self.training and self.tok_embeddings(idx.repeat(2, 1))"
    done = bench(tmp_path, "--level", "engine", work=double)
    assert done.returncode == 1 and "not timed: LlamaGen trains on sequences x tokens [(4, 63), (2, 63)]" in done.stderr


@pytest.mark.parametrize("views", ["1", "2"])
def test_self_guided_training_is_compared_at_equal_sequences(tmp_path, views):
    done = bench(tmp_path, "--star", "--student-views", views)
    assert done.returncode == 0, done.stderr
    assert f"one step of nano, {2 * int(views)} sequences" in done.stdout and "ST-AR / AR per sequence" in done.stdout
