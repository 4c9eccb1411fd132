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

from megastar.checkpoint.shard_format import PREFIX, StateReader, check_parameters
from megastar.config.schema import RunConfig
from megastar.run_dir import manifest as manifests
from megastar.run_dir.checkpoint_dir import find_checkpoint, read_manifest, verify
from megastar.utils.progress_bar import progress_bar

SELF_GUIDED = (  # fields that weights record
    *("student_views", "mask_ratio", "alpha", "beta", "contrastive_block", "positions", "step_loss", "view_loss"),
    "teacher_decay",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint folder with its manifest and configuration. ``console`` shows progress (None: no progress)."""

    folder: Path
    manifest: dict[str, Any]
    cfg: RunConfig
    reader: StateReader
    console: Console | None

    def verify(self) -> None:
        """Compare every file's hash with the manifest. ``UserError`` names the damaged one."""
        files = self.manifest["files"]
        total = sum(f["bytes"] for f in files.values())
        with progress_bar(self.console, f"checking {self.folder.name}", total, bytes=True, transient=True) as bar:
            for name, entry in files.items():
                verify(self.folder, [name])
                bar.advance(entry["bytes"])

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name (LlamaGen's) -> shape of the transformer's weights."""
        return {n.removeprefix(PREFIX): s for n, s in self.reader.shapes.items() if n.startswith(PREFIX)}

    def weight(self, name: str, weights: str) -> Tensor:
        """One of them, fp32, of the student (``student``) or its average (``ema``)."""
        return self.reader.whole(PREFIX + name, "ema" if weights == "ema" else "fp32")

    def provenance(self, weights: str) -> dict[str, Any]:
        """The provenance that a weights file records."""
        more = {name: self.manifest[name] for name in ("init", "tokenizer", "downsample") if self.manifest.get(name)}
        return more | {
            "weights": weights,
            "step": self.manifest["step"],
            "of_steps": self.manifest.get("steps"),
            "images_seen": self.manifest["step"] * self.cfg.train.global_batch,
            "seed": self.cfg.train.seed,
            "method": self.cfg.method_name,
            "self_guided": self.cfg.self_guided.enabled,
            "objective": self._objective(),
            **self._token_order(),
            **({} if self.cfg.model.class_dropout_prob else {"null_class": False}),
            "classes": self.manifest.get("classes"),
            "command": self.manifest.get("command"),
        }

    def _objective(self) -> dict[str, Any]:
        """The crops of an image, and the settings of the losses besides next-token prediction."""
        guided, repa = self.cfg.self_guided, self.cfg.repa
        out: dict[str, Any] = {"views": self.cfg.views}
        if guided.enabled:
            out |= {name: getattr(guided, name) for name in SELF_GUIDED}
        if repa.active:
            out |= {"repa_encoder": repa.encoder, "repa_weight": repa.weight}
            out["repa_block"] = repa.block_of(self.cfg.model.n_layer)
        return out

    def _token_order(self) -> dict[str, Any]:
        """Of a random order: the share of permuted images in the last step."""
        order, samples = self.cfg.token_order, self.manifest.get("samples")
        if order.kind != "random":
            return {}
        share = None
        if isinstance(samples, int) and samples > 0:
            per_step = self.cfg.train.global_batch / samples  # passes over the shards
            last = max(0, self.manifest["step"] - 1)
            share = order.random_share(last * per_step, self.cfg.train.total_steps(samples) * per_step)
        return {"token_order": {"kind": "random", "permuted_share": share}}


def open_source(path: Path, console: Console | None = None) -> Source:
    """A run folder, its checkpoints folder, or one checkpoint, whose files have the names and sizes of the manifest."""
    folder = find_checkpoint(Path(path))
    manifest = read_manifest(folder)
    cfg = manifests.config_of(folder, manifest)
    check_parameters(folder, manifest, cfg.model)
    return Source(folder, manifest, cfg, StateReader(folder, manifest), console)


def elements_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def stored_elements(reader: StateReader) -> int:
    """Of the weights and all states."""
    return sum(math.prod(shape) * len(reader.kinds(name)) for name, shape in reader.shapes.items())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality of fp32 tensors; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))
