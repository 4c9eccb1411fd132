"""Weights of any source as a folder in the Hub's layout."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megastar.checkpoint.convert import size_of
from megastar.checkpoint.convert_weights import WeightsFile, open_weights
from megastar.checkpoint.find_weights import Weights, find_weights
from megastar.checkpoint.hub.card import CardFacts, scores_of_run
from megastar.checkpoint.hub.layout import SHARD_BYTES, is_hub_folder
from megastar.checkpoint.hub.reader import check_undamaged
from megastar.checkpoint.hub.writer import HubContent, write_folder
from megastar.checkpoint.source import open_source
from megastar.config.env_text import recorded
from megastar.config.load import flatten
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import check_fits


def to_hub_folder(
    source: Path,
    out: Path,
    name: str,
    *,
    weights: str | None = None,
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    license: str = "",
    scores: Mapping[str, dict[str, Any]] | None = None,
    force: bool = False,
    console: Console | None = None,
    shard_bytes: int = SHARD_BYTES,
    **options: Any,
) -> str:
    """Write ``out``; returns one sentence. ``name``: the source as the user named it. ``options`` are those of
    ``open_weights`` for a .pt file. Raises ``UserError`` and leaves ``out`` unchanged."""
    start = time.perf_counter()
    facts = CardFacts(license=license, name=out.resolve().name, scores=scores or {})
    if source.is_dir() and not is_hub_folder(source):
        content = _of_run(source, weights or "ema", tokenizer, facts, console)
    else:
        content = _of_file(source, weights, tokenizer, facts, options)
    checked = write_folder(out, content, dtype=dtype, force=force, console=console, shard_bytes=shard_bytes)
    seconds, mb = time.perf_counter() - start, size_of(out) / 1e6
    return f"{out}: weights of {name}, {dtype} ({mb:.1f} MB in {seconds:.1f} s); {checked}"


def _of_run(path: Path, weights: str, tokenizer: Path | None, facts: CardFacts, console: Console | None) -> HubContent:
    source = open_source(path, console)
    check_fits(source.folder, source.weights, source.cfg.model)
    provenance, run = source.provenance(weights), source.folder.parent.parent
    cfg = source.cfg
    places = [Path(found) for found in (source.manifest.get("tokenizer_file"), cfg.data.tokenizer) if found]
    found = Weights(
        source.folder, cfg.data.tokenizer or None, cfg.data.shards or None, str(provenance.get("tokenizer") or ""), run,
        list(places),
    )  # fmt: skip
    opened = WeightsFile(
        source.folder, cfg.model, source.weights, lambda n: source.weight(n, weights), provenance
    )  # fmt: skip
    found.__dict__["opened"] = opened
    facts.data, facts.config = str(cfg.data.shards), flatten(recorded(asdict(cfg)))
    facts.scores = facts.scores or scores_of_run(run, int(provenance["step"]), weights)
    file = _tokenizer(found, provenance, tokenizer, path)
    return HubContent(cfg.model, provenance, opened.shapes, opened.read, file, facts, source.verify)


def _of_file(
    path: Path, weights: str | None, tokenizer: Path | None, facts: CardFacts, options: dict[str, Any]
) -> HubContent:
    opened = open_weights(path, weights=weights, **options)
    if not isinstance(opened.cfg, ModelConfig):
        raise UserError(f"{path} is a tokenizer: name the weights of a network, and this file with --tokenizer")
    found = find_weights(path) if path.is_dir() or path.suffix == ".safetensors" else Weights(path)
    found.__dict__["opened"] = opened
    file = _tokenizer(found, opened.provenance, tokenizer, path)
    content = HubContent(opened.cfg, opened.provenance, opened.shapes, opened.read, file, facts)
    if path.is_dir():  # damaged files would be recorded with hashes of their own
        content.verify = lambda: check_undamaged(path, "copy or download the folder again", tokenizer=tokenizer is None)
    return content


def _tokenizer(found: Weights, provenance: Mapping[str, Any], given: Path | None, path: Path) -> Path:
    file = Path(found.tokenizer_file(given))
    if not file.is_file():
        raise UserError(f"the tokenizer {file} of {path} does not exist: give its file with --tokenizer")
    return file
