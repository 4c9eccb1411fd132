"""The backend that ``auto`` uses: the one measured by ``megastar check-gpu`` on this GPU and torch, or a default order."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Without a table, on CUDA: not measured. For plain causal, sdpa is torch's own flash kernel in 16 bits, because sdpa.py
# disables cuDNN, which torch prefers on Hopper; in fp32 it is the memory-efficient one.
PLAIN = ("sdpa",)
MASKED = ("flex", "triton", "sdpa")


def table_path(device: torch.device) -> Path:
    """The table of this GPU model and torch release, in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name}-torch-{torch.__version__}".lower()).strip("-")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megastar" / f"attention-{slug}.json"


@functools.cache
def read_table(path: Path) -> dict[str, Any]:
    """{"plain" or "masked": {head dimension: {S: backend}}}; empty if there is no readable table."""
    try:
        choices = json.loads(path.read_text())["fastest"]
        return {
            kind: {int(d): {int(s): str(name) for s, name in row.items()} for d, row in rows.items()}
            for kind, rows in choices.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        logger.warning("cannot read the table %s (%r): run megastar check-gpu to write it again", path, error)
        return {}


def order(device: torch.device, plain: bool, head_dim: int, size: int) -> tuple[str, ...]:
    """Backends to try, best first, by the measurement nearest in head dimension, then in S."""
    if device.type == "cpu":
        return ("sdpa",)
    rows = read_table(table_path(device)).get("plain" if plain else "masked") or {0: {}}
    row = rows[min(rows, key=lambda d: abs(d - head_dim))]
    measured = (row[min(row, key=lambda s: abs(s - size))],) if row else ()
    return measured + (PLAIN if plain else MASKED)
