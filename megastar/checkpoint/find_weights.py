"""Resolve the weights given to a command, and their class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastar.config.files import find_file
from megastar.config.load import config_from_dict

SHIPPED_WEIGHTS = "assets/weights/demo-nano.safetensors"
SHIPPED_TOKENIZER = "assets/tokenizer/emoji64-vq.safetensors"


@dataclass
class Weights:
    """A source resolved to files."""

    file: Path
    tokenizer: str | None  # the run's; None for a weights file
    shards: str | None


def find_weights(source: str | Path | None, weights: str = "ema") -> Weights:
    """Resolve ``source``; a run folder or checkpoint is first converted to RUN/weights, once per step. Raises ``UserError``."""
    path = Path(source or SHIPPED_WEIGHTS)
    if not path.is_dir():
        return Weights(find_file(path) or path, None, None)
    from megastar.checkpoint.convert import convert
    from megastar.run_dir.checkpoint_dir import MANIFEST, find_checkpoint, read_manifest
    from megastar.utils.files import sha256

    checkpoint = find_checkpoint(path)
    digest = sha256(checkpoint / MANIFEST)[:8]  # a restarted run reuses checkpoint names
    file = checkpoint.parent.parent / "weights" / f"{weights}-{checkpoint.name}-{digest}.safetensors"
    cfg = config_from_dict(read_manifest(checkpoint)["config"])
    if not file.is_file():
        convert(checkpoint, "safetensors", file, weights=weights, force=True)  # another process may convert it too
    return Weights(file, cfg.data.tokenizer or None, cfg.data.shards or None)


def class_names(model_classes: int, provenance: dict[str, Any]) -> list[str]:
    """Class names from the weights' provenance, or numbers if there are none."""
    names = provenance.get("classes") or []
    return list(names) if len(names) == model_classes else [str(i) for i in range(model_classes)]


def labels_of(shards: str | Path) -> list[int]:
    """The class of every image in a folder of token shards."""
    import numpy as np

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards)
    _, labels = tokens.gather(np.arange(len(tokens)), np.zeros((len(tokens), 1), np.int64))
    return [int(label) for label in labels]
