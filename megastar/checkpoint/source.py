"""The checkpoint that a conversion reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megastar.checkpoint.atomic_output import byte_bar
from megastar.checkpoint.shard_format import StateReader
from megastar.config.load import config_from_dict
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir.checkpoint_dir import find_checkpoint, read_manifest, verify
from megastar.utils.device import DTYPES

PREFIX = "transformer."  # of the network's own weights; the projector serves training only


@dataclass(frozen=True)
class Source:
    """``about`` is the checkpoint's manifest, ``console`` where progress is shown (None: nowhere)."""

    folder: Path
    about: dict[str, Any]
    cfg: RunConfig
    reader: StateReader
    console: Console | None

    def verify(self) -> None:
        """Compare every file's hash with the manifest. ``UserError`` names the damaged one."""
        files = self.about["files"]
        with byte_bar(self.console, f"checking {self.folder.name}", sum(f["bytes"] for f in files.values())) as advance:
            for name, entry in files.items():
                verify(self.folder, [name])
                advance(entry["bytes"])

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name (LlamaGen's) -> shape of the transformer's weights."""
        return {n.removeprefix(PREFIX): s for n, s in self.reader.shapes.items() if n.startswith(PREFIX)}

    def weight(self, name: str, weights: str, dtype: torch.dtype) -> Tensor:
        """One of them, of the student (``student``) or of its average (``ema``). ``UserError`` where fp16 overflows."""
        whole = self.reader.whole(PREFIX + name, kind_of(weights))
        cast = whole.to(dtype)
        if dtype == torch.float16 and bool((whole.abs().amax() > torch.finfo(dtype).max) & whole.isfinite().all()):
            raise UserError(f"{name} reaches {whole.abs().amax():.3g}, beyond fp16's 65504: use --dtype bf16")
        return cast

    def provenance(self, weights: str) -> dict[str, Any]:
        """What a weights file says of its origin."""
        init = {"init": self.about["init"]} if self.about.get("init") else {}
        return init | {
            "weights": weights,
            "step": self.about["step"],
            "of_steps": self.about.get("steps"),
            "images_seen": self.about["step"] * self.cfg.train.global_batch,
            "seed": self.cfg.train.seed,
            "self_guided": self.cfg.self_guided.enabled,
            "classes": self.about.get("classes"),
            "command": self.about.get("command"),
        }


def open_source(path: Path, console: Console | None = None) -> Source:
    """A run folder, its checkpoints folder, or one checkpoint; its files have the manifest's names and sizes."""
    folder = find_checkpoint(Path(path))
    about = read_manifest(folder)
    return Source(folder, about, config_from_dict(about["config"]), StateReader(folder, about), console)


def kind_of(weights: str) -> str:
    return {"ema": "ema", "student": "fp32"}[weights]


def bytes_of(shapes: dict[str, tuple[int, ...]], dtype: str = "fp32") -> int:
    return sum(math.prod(s) for s in shapes.values()) * DTYPES[dtype].itemsize


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of fp32 tensors to the last bit; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))
