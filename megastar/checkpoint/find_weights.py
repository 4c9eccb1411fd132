"""Resolve the weights given to a command, their tokenizer, and their class names."""

from __future__ import annotations

import logging
import os
import shlex
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.checkpoint.find_tokenizer import (
    SHIPPED_TOKENIZER,
    SHORT,
    identity_of,
    recorded_identity,
    search_tokenizer,
)
from megastar.checkpoint.hub.download import is_hub_source, local_source, local_tokenizer
from megastar.checkpoint.hub.layout import TOKENIZER, is_hub_folder
from megastar.checkpoint.hub.reader import digest_file, read_folder, tokenizer_in
from megastar.config.files import find_file
from megastar.config.schema import DataConfig, ModelConfig
from megastar.errors import UserError, nearest
from megastar.utils.json_file import shown

if TYPE_CHECKING:
    import torch

    from megastar.checkpoint.convert_weights import WeightsFile
    from megastar.checkpoint.llamagen_reader import NeedsOption
    from megastar.model.transformer import Transformer

logger = logging.getLogger(__name__)
SHIPPED_WEIGHTS = "assets/weights/demo-nano.safetensors"


@dataclass
class Weights:
    """A source resolved to files."""

    file: Path  # of weights in several files their folder
    tokenizer: str | None = None  # the run's
    shards: str | None = None
    recorded: str = ""  # the tokenizer's hash in the run's checkpoint
    run: Path | None = None
    places: list[Path | None] = field(default_factory=list)  # where the run had its tokenizer
    chosen: str | None = None  # of several sets in a .pt file
    data: DataConfig | None = None  # the run's: its cache and patience

    @cached_property
    def opened(self) -> WeightsFile:
        """The file of a network, of megastar or of LlamaGen; its tensors are read later. Raises ``UserError``."""
        return open_network(self.file, weights=self.chosen)

    @property
    def digest_file(self) -> Path:
        """The file whose SHA-256 identifies the weights."""
        return digest_file(self.file) if self.file.is_dir() else self.file

    @property
    def config(self) -> ModelConfig:
        cfg = self.opened.cfg
        assert isinstance(cfg, ModelConfig)
        return cfg

    @property
    def provenance(self) -> dict[str, Any]:
        return self.opened.provenance

    @cached_property
    def identity(self) -> str:
        """Hash of the tokenizer whose codes the weights were trained on; empty if nothing records it."""
        found = self.recorded or recorded_identity(self.provenance)
        shipped = find_file(SHIPPED_TOKENIZER)
        return identity_of(shipped) if not found and shipped and is_shipped(self.file) else found

    def tokenizer_file(self, given: str | Path | None = None) -> str:
        """The tokenizer to use: the given one (of ``local_tokenizer``), or a file with the recorded hash: the run's, one beside its shards or the
        weights, or the shipped one. Raises ``UserError`` if there is none, or if no hash is recorded and none is given."""
        if given:
            return local_tokenizer(given if is_hub_source(given) else find_file(given) or given)
        if self.identity:
            folders = [
                self.file.parent,
                self.file.parent / TOKENIZER,
                *([self.run, self.run.parent] if self.run else []),
            ]
            if self.shards and "://" not in self.shards:
                roots = [Path(), *(self.run.resolve().parents if self.run else [])]
                folders += [p for root in roots for p in (root / self.shards, (root / self.shards).parent)]
            return str(search_tokenizer(self.run or self.file, self.identity, self.places, folders))
        if found := next((p for p in self.places if p is not None and p.is_file()), None):
            return str(found)
        if self.tokenizer:
            return self.tokenizer
        raise UserError(
            f"{self.run or self.file} records no tokenizer, so the one of its codes is not known: give it with --tokenizer"
        )

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
        """The network in ``dtype`` (default fp32), frozen, in eval mode. Raises ``UserError``."""
        from megastar.model.io import build_model

        return build_model(self.config, self.opened.shapes, self.opened.read, device, dtype)

    def require_null_class(self, use: str) -> None:
        """Raise ``UserError`` if the class table has no null class, which ``use`` needs."""
        if not has_null_class(self.provenance):
            raise UserError(f"{self.file} has no null class (it was trained without dropping labels), which {use}")


def has_null_class(provenance: dict[str, Any]) -> bool:
    """Whether the null class was trained. ``provenance``: as ``WeightsFile`` has it."""
    return provenance.get("null_class") is not False


def open_network(file: Path, **options: Any) -> WeightsFile:
    """``open_weights`` of a network. For what only options of ``megastar convert`` supply, the error has that command."""
    from megastar.checkpoint.convert_weights import open_weights
    from megastar.checkpoint.llamagen_reader import NeedsOption

    try:
        found = open_weights(file, **options)
    except NeedsOption as error:
        if error.option.startswith("--weights"):
            raise
        raise UserError(f"{error}: {convert_hint(file, error)}") from error
    if not isinstance(found.cfg, ModelConfig):
        raise UserError(f"{file} is a tokenizer: give the weights of a network, and this file with --tokenizer")
    return found


def convert_hint(file: Path, error: NeedsOption) -> str:
    """The command that converts ``file`` with the option that it needs."""
    out = file.with_suffix(".safetensors").name
    return f"megastar convert {shlex.quote(str(file))} --to safetensors --out {shlex.quote(out)} {error.option}"


def is_shipped(file: Path) -> bool:
    """Whether ``file`` is the shipped weights file or a copy of it."""
    from megastar.utils.files import sha256

    shipped = find_file(SHIPPED_WEIGHTS)
    if shipped is None or not file.is_file():
        return False
    same_size = shipped.stat().st_size == file.stat().st_size
    return shipped.samefile(file) or same_size and sha256(shipped) == sha256(file)


def find_weights(source: str | Path | None, weights: str | None = None) -> Weights:
    """Resolve ``source``; a run folder or checkpoint is first converted to RUN/weights, once per step.

    ``source``: also a folder in the Hub's layout, or hf://owner/name[@revision]. ``weights``: of a run ema (default) or
    student, of a .pt file with several sets the name of one. Raises ``UserError``.
    """
    path = local_source(source or SHIPPED_WEIGHTS)
    if not source and find_file(path) is None:
        raise UserError(
            f"the shipped weights {path} are not in this installation: name a run folder or a .safetensors file, or "
            "install megastar again from a clone of the repository"
        )
    if is_hub_folder(path):
        return _of_hub_folder(path, weights)
    if not path.is_dir():
        found = Weights(find_file(path) or path, chosen=weights)
        if found.file.suffix == ".safetensors":
            found.chosen = None
            _check_set(found, weights)
        return found
    return _of_run(path, weights or "ema")


def _of_hub_folder(path: Path, weights: str | None) -> Weights:
    """A single weights file is read as one."""
    _, provenance, _ = read_folder(path)
    one = digest_file(path)
    file = one if one.suffix == ".safetensors" else path
    found = Weights(file, recorded=recorded_identity(provenance), places=[tokenizer_in(path)])
    _check_set(found, weights)
    return found


def _check_set(found: Weights, weights: str | None) -> None:
    """Raise ``UserError`` if a file with one set of weights has not the one that is asked for."""
    _check_name(weights)
    if weights and (has := found.provenance.get("weights", weights)) != weights:
        raise UserError(f"{found.file} contains the {has} weights only: leave out --weights {weights}")


def _of_run(path: Path, weights: str) -> Weights:
    from megastar.checkpoint.convert import convert
    from megastar.run_dir.checkpoint_dir import MANIFEST, find_checkpoint, read_manifest
    from megastar.run_dir.layout import CONFIG
    from megastar.run_dir.manifest import config_of
    from megastar.utils.files import sha256

    _check_name(weights)
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    cfg, run = config_of(checkpoint, manifest), checkpoint.parent.parent
    digest = sha256(checkpoint / MANIFEST)[:8]  # a restarted run reuses checkpoint names
    file = run / "weights" / f"{weights}-{checkpoint.name}-{digest}.safetensors"
    if not file.is_file():
        convert(checkpoint, "safetensors", file, weights=weights, force=True)  # another process may convert it too
    places: list[Path | None] = [Path(manifest["tokenizer_file"])] if manifest.get("tokenizer_file") else []
    places += [find_file(cfg.data.tokenizer, run / CONFIG)] if cfg.data.tokenizer else []
    return Weights(
        file,
        cfg.data.tokenizer or None,
        cfg.data.shards or None,
        recorded_identity(manifest),
        run,
        places,
        data=_readable(cfg.data),
    )


def _readable(data: DataConfig) -> DataConfig:
    """The run's section, without a cache folder that this machine cannot have: it may not be the one of the training."""
    folder = Path(data.cache).absolute()
    if data.cache and not os.access(next(p for p in (folder, *folder.parents) if p.is_dir()), os.W_OK):
        logger.info("data.cache = %s cannot be written here: the default cache is used", data.cache)
        return replace(data, cache="")
    return data


def _check_name(weights: str | None) -> None:
    if weights not in (None, "ema", "student"):
        raise UserError(f"weights {weights!r} is unknown: a run has ema and student")


def check_codes(what: object, identity: str, shards: str | Path, data: DataConfig | None = None) -> None:
    """Raise ``UserError`` if the codes in ``shards`` are of another tokenizer than ``identity``; one may be unknown."""
    from megastar.data.shards.manifest import load_manifest

    theirs = load_manifest(shards, data).tokenizer_sha256
    if theirs and identity and theirs != identity:
        raise UserError(
            f"{what} was trained on codes of the tokenizer {identity[:SHORT]}, but {shards} was made with "
            f"{theirs[:SHORT]}: name token shards of the tokenizer of the training"
        )


def class_names(model_classes: int, provenance: dict[str, Any]) -> list[str]:
    """Class names from the weights' provenance, or numbers if there are none."""
    names = provenance.get("classes") or []
    return list(names) if len(names) == model_classes else [str(i) for i in range(model_classes)]


def class_number(name: str | int, names: list[str]) -> int:
    """The number of a class, given by its name or number. Raises ``UserError`` for an unknown one."""
    if name in names:
        return names.index(str(name))
    if isinstance(name, int) or (name.isascii() and name.isdigit()):
        if len(str(name)) < 20 and 0 <= int(name) < len(names):
            return int(name)
        raise UserError(f"class {shown(name)} is outside 0..{len(names) - 1}, the classes of these weights")
    raise UserError(f"class {name!r} is unknown: {nearest(name, names)}")


def labels_of(shards: str | Path, data: DataConfig | None = None) -> list[int]:
    """The class of every image in a folder or s3:// URL of token shards. ``data``: cache and patience."""
    import numpy as np

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards, data=data)
    _, labels = tokens.gather(np.arange(len(tokens)), np.zeros((len(tokens), 1), np.int64))
    return [int(label) for label in labels]
