"""Checkpoints for tests and benchmarks, written as ranks of a data x tensor mesh write them, without any rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megastar.checkpoint.rng_state import random_file
from megastar.checkpoint.shard_format import PREFIX, Piece, StateReader, kinds_of, state_file, write_pieces
from megastar.config.schema import ModelConfig, RunConfig
from megastar.engine.student import Student
from megastar.model.io import metadata_of
from megastar.parallel.plan import split_of
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.layout import FORMAT
from megastar.utils.files import sha256

Whole = dict[str, dict[str, Tensor]]  # name -> kind -> the whole tensor


def full_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Name -> fp32 tensor of the student (``student``) or its average (``ema``), transformer only."""
    reader, kind = StateReader(folder, checkpoint_dir.read_manifest(folder)), "ema" if weights == "ema" else "fp32"
    return {n.removeprefix(PREFIX): reader.whole(n, kind) for n in reader.shapes if n.startswith(PREFIX)}


def save_model(path: str | Path, state_dict: Mapping[str, Tensor], cfg: ModelConfig, provenance: Any) -> None:
    """A weights file, as ``megastar convert`` writes it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state_dict.items()}, path, metadata=metadata_of(cfg, provenance))


def shapes_of(cfg: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in Student(cfg).named_parameters()}


def draw(name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(hash_of(name, kind))
    tensor = torch.randn(shape, generator=g)
    return tensor.square() if kind == "exp_avg_sq" else tensor


def hash_of(name: str, kind: str) -> int:
    return int.from_bytes(f"{kind}/{name}".encode(), "little") % (2**61 - 1)


def whole_of(cfg: RunConfig) -> Whole:
    return {n: {k: draw(n, k, s) for k in kinds_of(n, cfg.optim.name)} for n, s in shapes_of(cfg).items()}


def write_checkpoint(run: Path, cfg: RunConfig, data: int, tensor: int, step: int = 3) -> Path:
    """Every rank's pieces: a tensor rank's part of a weight, laid flat, in ``data`` nearly equal parts."""
    folder, shapes = run / "checkpoints", shapes_of(cfg)
    written = folder / checkpoint_dir.WRITING / checkpoint_dir.name_of(step)
    written.mkdir(parents=True)
    files = {}
    for rank in range(data * tensor):
        d, t = rank // tensor, rank % tensor
        pieces = []
        for name, shape in shapes.items():
            split = split_of(name) if tensor > 1 else None
            kinds = {k: draw(name, k, shape) for k in kinds_of(name, cfg.optim.name)}
            local = {k: (split.cut(v, tensor, t) if split else v).reshape(-1) for k, v in kinds.items()}
            size, (part, parts) = local["fp32"].numel(), (d, data) if split else (rank, data * tensor)
            low, high = size * part // parts, size * (part + 1) // parts
            if low < high:
                piece = Piece(name, t if split else 0, low, high, tuple(kinds))
                pieces.append((piece, {k: v[low:high].clone() for k, v in local.items()}))
        size, digest = write_pieces(written / state_file(rank), pieces)
        whose = f"rank {rank}: data rank {d}, tensor rank {t}"
        files[state_file(rank)] = {"bytes": size, "sha256": digest, "whose": whose}
        if t == 0:
            path = written / random_file(d)
            torch.save({"torch": torch.Generator().manual_seed(d).get_state()}, path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "whose": whose}
    manifest = {
        "format": FORMAT, "step": step, "steps": 8, "optimizer_step": step, "optimizer": cfg.optim.name, "dtype": "torch.float32",
        "mesh": {"data": data, "tensor": tensor, "zero_stage": 3}, "data": "0" * 64, "classes": list("abcde"),
        "command": "megastar train", "config": asdict(cfg) | {"run": str(run)}, "files": files,
        "parameters": {n: list(s) for n, s in shapes.items()},
    }  # fmt: skip
    return checkpoint_dir.publish(folder, checkpoint_dir.name_of(step), manifest)
