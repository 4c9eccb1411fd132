"""Which backend ``auto`` takes: what ``megastar check-gpu`` measured on this GPU and torch, or an order of ours."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

# Without a table, on CUDA: unmeasured. Plain causal is torch's own flash kernel; flex and triton are checked against
# sdpa when first used.
PLAIN = ("sdpa",)
MASKED = ("flex", "triton", "sdpa")


def table_path(device: torch.device) -> Path:
    """A file a GPU model and torch release, in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name}-torch-{torch.__version__}".lower()).strip("-")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megastar" / f"attention-{slug}.json"


@functools.cache
def read_table(path: Path) -> dict[str, Any]:
    """{"plain" or "masked": {head dimension: {S: backend}}}; empty without a table."""
    try:
        choices = json.loads(path.read_text())["fastest"]
        return {
            kind: {int(d): {int(s): str(name) for s, name in row.items()} for d, row in rows.items()}
            for kind, rows in choices.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        warnings.warn(
            f"the table {path} cannot be read ({error!r}): run megastar check-gpu to write it anew", stacklevel=2
        )
        return {}


def order(device: torch.device, plain: bool, head_dim: int, size: int) -> tuple[str, ...]:
    """Backends to try, best first; the measurement nearest in head dimension, then in S, counts."""
    if device.type == "cpu":
        return ("sdpa",)
    rows = read_table(table_path(device)).get("plain" if plain else "masked")
    fallback = PLAIN if plain else MASKED
    if not rows:
        return fallback
    row = rows[min(rows, key=lambda d: abs(d - head_dim))]
    if not row:
        return fallback
    return (row[min(row, key=lambda s: abs(s - size))], *fallback)
