"""Compiled blocks on the null GPU: no graph break, no compilation after the first steps, every ZeRO stage."""

from __future__ import annotations

import json

import pytest

from tests.nullgpu.test_commands import folder, shards, train  # noqa: F401

pytestmark = pytest.mark.nullgpu


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("backend", ["sdpa", "flex", "triton"])
def test_a_fresh_mask_compiles_nothing(folder, shards, stage: str, backend: str) -> None:  # noqa: F811
    more = ("train.compile=on", f"attention.backend={backend}", f"parallel.deepspeed={stage}", "train.val_every=0")
    run_dir, _ = train(folder, shards, f"compiled-{stage}-{backend}", *more)
    (started,) = (
        e for e in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines()) if e["event"] == "started"
    )
    assert started["compiled"] and all(name.startswith(backend) for name in started["attention"].values())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    counts = [row["compilations"] for row in rows if "compilations" in row]
    assert len(counts) > 1 and len(set(counts)) == 1 and counts[0] > 0
