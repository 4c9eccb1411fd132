"""Resolve the weights given to a command, and their class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastar.config.files import find_file
from megastar.errors import UserError, nearest

SHIPPED_WEIGHTS = "assets/weights/demo-nano.safetensors"
SHIPPED_TOKENIZER = "assets/tokenizer/emoji64-vq.safetensors"


@dataclass
class Weights:
    """A source resolved to files."""

    file: Path
    tokenizer: str | None  # the run's; None for a weights file
    shards: str | None

    def tokenizer_file(self, given: str | Path | None = None) -> str:
        """The tokenizer to use: the given one, the run's, or the shipped one."""
        name = given or self.tokenizer or SHIPPED_TOKENIZER
        return str(find_file(name) or name)


def find_weights(source: str | Path | None, weights: str = "ema") -> Weights:
    """Resolve ``source``; a run folder or checkpoint is first converted to RUN/weights, once per step. Raises ``UserError``."""
    path = Path(source or SHIPPED_WEIGHTS)
    if not source and find_file(path) is None:
        raise UserError(
            f"the shipped weights {path} are not in this installation: name a run folder or a .safetensors file, or "
            "install megastar again from a clone of the repository"
        )
    if not path.is_dir():
        return Weights(find_file(path) or path, None, None)
    from megastar.checkpoint.convert import convert
    from megastar.run_dir.checkpoint_dir import MANIFEST, find_checkpoint, read_manifest
    from megastar.run_dir.manifest import config_of
    from megastar.utils.files import sha256

    checkpoint = find_checkpoint(path)
    cfg = config_of(checkpoint, read_manifest(checkpoint))
    digest = sha256(checkpoint / MANIFEST)[:8]  # a restarted run reuses checkpoint names
    file = checkpoint.parent.parent / "weights" / f"{weights}-{checkpoint.name}-{digest}.safetensors"
    if not file.is_file():
        convert(checkpoint, "safetensors", file, weights=weights, force=True)  # another process may convert it too
    return Weights(file, cfg.data.tokenizer or None, cfg.data.shards or None)


def class_names(model_classes: int, provenance: dict[str, Any]) -> list[str]:
    """Class names from the weights' provenance, or numbers if there are none."""
    names = provenance.get("classes") or []
    return list(names) if len(names) == model_classes else [str(i) for i in range(model_classes)]


def class_number(name: str | int, names: list[str]) -> int:
    """The number of a class, given by its name or number. Raises ``UserError`` for an unknown one."""
    if name in names:
        return names.index(str(name))
    if isinstance(name, int) or name.isdigit():
        if 0 <= int(name) < len(names):
            return int(name)
        raise UserError(f"class {name} is outside 0..{len(names) - 1}, the classes of these weights")
    raise UserError(f"class {name!r} is unknown: {nearest(name, names)}")


def labels_of(shards: str | Path) -> list[int]:
    """The class of every image in a folder of token shards."""
    import numpy as np

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards)
    _, labels = tokens.gather(np.arange(len(tokens)), np.zeros((len(tokens), 1), np.int64))
    return [int(label) for label in labels]
