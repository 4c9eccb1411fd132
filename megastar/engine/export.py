"""A checkpoint's sharded fp32 weights -> one safetensors file, read without DeepSpeed's engine or a process group."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.config.load import config_from_dict
from megastar.device import DTYPES
from megastar.engine import checkpoint
from megastar.errors import UserError
from megastar.model.io import save_model


def find_checkpoint(path: Path) -> Path:
    """A run folder, its checkpoints folder, or one checkpoint -> the checkpoint."""
    if (path / checkpoint.MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (found := checkpoint.latest(folder)):
            return found
    raise UserError(f"no complete checkpoint in {path}: name a run folder or a folder step-*")


def full_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Name -> fp32 tensor of the student (``student``) or of its average (``ema``), transformer only.

    ZeRO-3 cuts each parameter into world equal parts (the last padded) and each rank lays its parts end to end, in
    the order of ``param_shapes``: so part r of a parameter starts at the same offset in every rank's flat tensor.
    """
    ranks = []
    for file in sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        inner = state["optimizer_state_dict"]["state"]
        parts = [inner[k]["ema"] for k in sorted(inner)] if weights == "ema" else state["fp32_flat_groups"]
        ranks.append(torch.cat([p.flatten() for p in parts]))
    if not ranks:
        raise UserError(f"{folder} holds no ZeRO states: it is no checkpoint of megastar train")
    model_file = sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt"))[0]
    shapes: dict[str, torch.Size] = {}
    for group in torch.load(model_file, map_location="cpu", weights_only=False)["param_shapes"]:
        shapes.update(group)
    out, offset = {}, 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // len(ranks))
        whole = torch.cat([r[offset : offset + size] for r in ranks])[: shape.numel()].view(shape)
        if name.startswith("transformer."):
            out[name.removeprefix("transformer.")] = whole
        offset += size
    return out


def _rank_of(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])


def export(source: Path, out: Path, weights: str = "ema", dtype: str = "fp32") -> dict[str, Any]:
    """Write the student's (``student``) or the averaged (``ema``) transformer to ``out``; returns the provenance."""
    folder = find_checkpoint(Path(source))
    about = checkpoint.read_manifest(folder)
    checkpoint.verify(folder)
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
