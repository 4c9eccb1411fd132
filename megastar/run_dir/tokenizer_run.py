"""The run folder of ``megastar train-tokenizer``: what ``megastar status`` and ``report`` read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastar.config.schema import TokenizerTrainConfig, TrainConfig
from megastar.errors import UserError
from megastar.run_dir.jsonl import METRICS_ROW, read_jsonl
from megastar.run_dir.layout import METRICS
from megastar.utils.json_file import shown

STATE = "last.pt"  # the newest checkpoint; older ones are not kept
MAX_ROWS = 8 << 20  # bytes of metrics.jsonl that are read, from its end
SCORES = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "codes_used": "{:.1%} of the codes"}


def is_tokenizer_run(fields: Mapping[str, Any]) -> bool:
    """Whether ``fields`` of a config.yaml are those of a ``TokenizerTrainConfig``."""
    return "pictures" in fields and "model" not in fields


def as_train(fields: Mapping[str, Any]) -> TrainConfig:
    """Length and intervals of the run, as ``megastar train`` names them. Raises ``UserError``."""
    defaults, found = TokenizerTrainConfig(), {}
    for name in ("steps", "log_every", "save_every"):
        value = fields.get(name, getattr(defaults, name))
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
            raise UserError(f"{name} = {shown(str(value))} is not a number of steps")
        found[name] = int(value)
    return TrainConfig(steps=found["steps"], log_every=found["log_every"], save_every=found["save_every"])


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The newest rows of metrics.jsonl."""
    return read_jsonl(run / METRICS, METRICS_ROW, MAX_ROWS)


def read_state(run: Path, past: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """The fields of ``Status`` about the checkpoint, whose step is that of the newest event about it."""
    try:
        age = max(0.0, now - (run / STATE).stat().st_mtime)
    except OSError:
        return {}
    steps = [e["step"] for e in past if e["event"] in ("saved", "resumed") and isinstance(e.get("step"), int)]
    return {"checkpoint": STATE, "checkpoint_step": steps[-1] if steps else None, "checkpoint_age_s": age}


def describe_scores(rows: list[dict[str, Any]]) -> str:
    """The scores of the newest validation in a sentence; empty without one."""
    row = next((r for r in reversed(rows) if isinstance(r.get("psnr"), (int, float))), None)
    if row is None:
        return ""
    names = [n for n in row if n in SCORES or n.startswith(("rFD", "rFID"))]
    known = [(n, row[n]) for n in names if isinstance(row[n], (int, float))]
    texts = [SCORES[n].format(v) if n in SCORES else f"{n[:40]} {v:.4g}" for n, v in known]
    return f"{', '.join(texts)} at step {row['step']}"
