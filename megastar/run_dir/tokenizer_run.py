"""The run folder of ``megastar train-tokenizer``, told from that of ``megastar train`` by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_tokenizer_run(fields: Mapping[str, Any]) -> bool:
    """Whether ``fields`` of a config.yaml are those of a ``TokenizerTrainConfig``."""
    return "pictures" in fields and "model" not in fields
