"""The sizes of the model that the token shards determine: classes, codes, tokens.

A size that neither the run file nor an override sets is that of the run's earlier start, else of the shards' manifest.
The file that ``model`` names (configs/model/b.yaml) describes a size of the network: its values are the defaults. Until
the sizes are taken, the fields have those defaults, which `megastar plan` uses without shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.config.files import read_yaml, require_file
from megastar.config.schema import RunConfig
from megastar.config.validate import find_problems
from megastar.errors import UserError

SIZES_OF_DATA = ("vocab_size", "num_classes", "image_tokens")


def unset_sizes(data: Mapping[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """The sizes that neither ``data``, the run's own fields, nor the overrides set."""
    own = data.get("model")
    given = set(own) if isinstance(own, Mapping) else set()
    for text in overrides:
        name, _, value = text.partition("=")
        if name == "model":  # replaces the section by a file, or by fields
            given = {size for size in SIZES_OF_DATA if size in value and "{" in value}
        given.add(name.removeprefix("model."))
    return frozenset(SIZES_OF_DATA) - given


def unset_sizes_of_base(data: dict[str, Any], overrides: Sequence[str], near: Path | None) -> frozenset[str]:
    """The unset sizes of the section ``base`` of a comparison: its fields, or the path of a run file."""
    base = data.get("base")
    for text in overrides:
        base = text.removeprefix("base=") if text.startswith("base=") else base
    with suppress(UserError):  # reported where the file is included
        base = read_yaml(require_file(base, "base", near)) if isinstance(base, str) else base
    own = [text.removeprefix("base.") for text in overrides if text.startswith("base.")]
    return unset_sizes(base if isinstance(base, dict) else {}, own)


def take_sizes(cfg: RunConfig, sizes: Mapping[str, int], origin: str) -> list[str]:
    """Set the unset sizes of ``cfg.model`` to ``sizes``; returns a sentence about them for the log.

    Raises ``UserError`` for sizes that do not fit the rest of the configuration.
    """
    if not (words := set_sizes(cfg, sizes)):
        return []
    if problem := next(iter(find_problems(cfg)), None):
        raise UserError(f"{words}, from {origin}: {problem.text}")
    return [f"{words}, from {origin}"]


def set_sizes(cfg: RunConfig, sizes: Mapping[str, int]) -> str:
    """Set the unset sizes of ``cfg.model`` to ``sizes``, unchecked; returns those that were set, in words."""
    taken = {name: sizes[name] for name in SIZES_OF_DATA if name in cfg.model.unset and name in sizes}
    for name, value in taken.items():
        setattr(cfg.model, name, value)
    return ", ".join(f"model.{name} = {value}" for name, value in taken.items())
