"""A checkpoint's sharded fp32 weights -> one safetensors file, read without DeepSpeed's engine or a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from megastar.config.load import config_from_dict
from megastar.device import DTYPES
from megastar.engine.folders import find_checkpoint, read_manifest, verify
from megastar.engine.state_files import StateReader
from megastar.model.io import save_model


def full_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Name -> fp32 tensor of the student (``student``) or of its average (``ema``), transformer only."""
    reader = StateReader(folder, read_manifest(folder))
    kind = "ema" if weights == "ema" else "fp32"
    names = [n for n in reader.shapes if n.startswith("transformer.")]
    return {n.removeprefix("transformer."): reader.whole(n, kind) for n in names}


def export(source: Path, out: Path, weights: str = "ema", dtype: str = "fp32") -> dict[str, Any]:
    """Write the student's (``student``) or the averaged (``ema``) transformer to ``out``; returns the provenance."""
    folder = find_checkpoint(Path(source))
    about = read_manifest(folder)
    verify(folder)
    cfg = config_from_dict(about["config"])
    provenance = {
        "weights": weights,
        "step": about["step"],
        "of_steps": about.get("steps"),
        "images_seen": about["step"] * cfg.train.global_batch,
        "seed": cfg.train.seed,
        "self_guided": cfg.self_guided.enabled,
        "classes": about.get("classes"),
        "command": about.get("command"),
    }
    save_model(Path(out), full_weights(folder, weights), cfg.model, provenance, DTYPES[dtype])
    return provenance
