"""``rollbacks.jsonl`` of a run folder: the returns to an earlier checkpoint, one a line (engine/fault_tolerance/rollback.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megastar.run_dir.jsonl import MAX_EVENTS, read_jsonl
from megastar.run_dir.layout import ROLLBACKS
from megastar.utils.json_file import FILE_NAME, integer, record, validator

_ROLLBACK = validator(record({"step": integer(), "to": FILE_NAME, "position": integer()}))


def read_rollbacks(run: Path) -> list[dict[str, Any]]:
    """The run's rollbacks, oldest first: the ``step`` left, the checkpoint ``to``, the ``position`` in the data."""
    return read_jsonl(run / ROLLBACKS, _ROLLBACK, MAX_EVENTS)
