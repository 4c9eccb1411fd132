"""`megastar demo`: results that lie in its folder from an earlier call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megastar.commands import demo
from tests.fuzz import DEEP

ROW = {"metric": "fd", "value": 1.5, "floor": 1.0, "step": 3}


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[1]", b"{}", DEEP.encode(), b"\xff\xfe", {"rows": {"a": {}}}, {"rows": {"a": ROW | {"value": "x"}}},
     {"samples": "x"}, {"rows": 5}],
)  # fmt: skip
def test_damaged_scores_are_made_again(tmp_path: Path, damage: bytes | dict[str, Any]) -> None:
    run = demo.Demo.__new__(demo.Demo)
    run.scores_file, run.grid, run.samples = tmp_path / "scores.json", tmp_path / "grid.png", 4
    run.cfg = demo.load_config(demo.CONFIG)
    run.grid.touch()
    shipped = demo.fingerprint(demo.find_file(demo.SHIPPED_WEIGHTS))
    config = json.loads(json.dumps(demo.asdict(run.cfg)))
    whole = {"rows": {"a": ROW}, "samples": 4, "config": config, "shipped": shipped}
    run.scores_file.write_text(json.dumps(whole))
    assert run.finished() == whole
    run.scores_file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(whole | damage).encode())
    assert run.finished() is None
