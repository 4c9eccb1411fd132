"""A field of a configuration: its default, help text and bounds. Plain dataclasses, no torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any

# Upper bounds: far above what anyone uses, below what overflows or fills a machine. Weights of losses and rates that
# make a run diverge are allowed.
MOST_SEED = 2**63 - 1
MOST_STEPS = 99_999_999  # folders of checkpoints have eight digits
MOST_BATCH = 2**24
MOST_THREADS = 1024
MOST_SECONDS = 10**9
LARGE = 1e30


def knob(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; lists are copied for each instance.

    Metadata that config/validate.py checks: ``choices`` (allowed values), ``low``/``high`` (inclusive bounds),
    ``above``/``below`` (exclusive ones). The bounds of a list apply to its members; ``fewest`` is their number in a
    weights file (default 1).
    """
    metadata["help"] = help
    if isinstance(default, (list, dict, type)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)
