"""megastar check-gpu on the null GPU: rows as they are measured, steps of 128 images beside their plan, and the time limit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.nullgpu.test_commands import run

pytestmark = pytest.mark.nullgpu


def test_kernels_and_steps_are_measured_in_time(tmp_path: Path) -> None:
    out, begun = tmp_path / "check-gpu.json", time.monotonic()
    text = run(tmp_path, "check-gpu", "--seconds", 60, "--out", out)
    assert time.monotonic() - begun < 180  # a measurement that has begun ends
    report = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["device"]["name"] == "NVIDIA H200" and report["failures"] == []
    assert {"sdpa", "flex", "triton"} <= {r["backend"] for r in report["compared"] if r["ok"]}
    assert any("ms" in row for row in report["timed"])
    steps = report["steps"]
    assert len(steps) == 18 and [steps[0][k] for k in ("model", "method", "images")] == ["b", "ar", 128]
    for row in steps:
        measured = "step_s" in row
        assert row["why"] == "no time left" if not measured else row["peak_gib"] < 1.1 * row["plan_gib"], row
    assert "step_s" in steps[0] and any(len(line) > 120 for line in text.splitlines())  # not cut at 80 columns
