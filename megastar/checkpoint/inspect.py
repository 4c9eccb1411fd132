"""Print what a checkpoint or a weights file holds, its provenance and the health of its files. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megastar.checkpoint.hub.layout import CONFIG, TOKENIZER, TOKENIZER_FILE, is_hub_folder, read_config
from megastar.checkpoint.hub.reader import damaged_files, damaged_tokenizer, read_folder, tokenizer_in
from megastar.checkpoint.shard_format import PREFIX, STATES, StateReader, check_parameters
from megastar.config.env_text import recorded
from megastar.config.schema import ModelConfig, RunConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import read_model_header
from megastar.run_dir.checkpoint_dir import damaged, find_checkpoint, parse_manifest
from megastar.run_dir.manifest import config_of, file_problem, optimizer_of
from megastar.tokenizer.io import FORMAT as TOKENIZER_FORMAT
from megastar.tokenizer.io import read_tokenizer_header
from megastar.utils.files import sha256
from megastar.utils.json_file import SHA256, read_json, record, validator
from megastar.utils.progress_bar import progress_bar
from megastar.utils.weights.safetensors_header import read_header

_BESIDE = validator(record({"sha256": SHA256}))
Shapes = dict[str, tuple[int, ...]]
WeightsHeader = tuple[ModelConfig | TokenizerConfig, dict[str, Any], Shapes]  # architecture, provenance, shapes


def inspect(path: Path, verify: bool, console: Console) -> bool:
    """Print the checkpoint in ``path``; returns whether it is complete. ``verify`` compares hashes, not only sizes.

    Raises ``UserError`` if there is none, and for an unreadable manifest.
    """
    folder = find_checkpoint(Path(path))
    manifest = parse_manifest(folder)
    cfg = config_of(folder, manifest)
    health, total = {}, sum(entry["bytes"] for entry in manifest["files"].values())
    with progress_bar(console if verify else None, "hashing", total, bytes=True, transient=True) as bar:
        for name, entry in manifest["files"].items():
            health[name] = health_of(folder / name, entry, verify)
            bar.advance(entry["bytes"])
    problem = str(damaged(folder, "damaged, see the files below"))
    if all(h.startswith("ok") for h in health.values()):
        try:
            check_parameters(folder, manifest, cfg.model)
            StateReader(folder, manifest).close()
            problem = ""
        except UserError as error:
            problem = str(error)
    head = Table("", "", show_header=False, box=None)
    head.columns[1].overflow = "fold"  # do not shorten paths
    for name, value in summary(folder, manifest, cfg).items():
        head.add_row(name, Text(value, overflow="fold"))  # data, not markup
    checked = ", SHA-256 too" if verify else "; --verify compares hashes too"
    head.add_row("health", problem or f"complete: names and sizes match{checked}")
    console.print(head)
    files = Table("file", "written by", "MB", "health", title="files")
    for name, entry in manifest["files"].items():
        files.add_row(name, Text(entry["whose"]), f"{entry['bytes'] / 1e6:.2f}", Text(health[name]))
    console.print(files)
    return not problem


def health_of(file: Path, entry: dict[str, Any], verify: bool) -> str:
    if problem := file_problem(file, entry["bytes"]):
        return problem.removeprefix("is ")
    if not verify:
        return "ok (size)"
    return "ok (SHA-256)" if sha256(file) == entry["sha256"] else "SHA-256 differs"


def summary(folder: Path, manifest: dict[str, Any], cfg: RunConfig) -> dict[str, str]:
    """The manifest's content by the configuration's names."""
    m, mesh = cfg.model, manifest["mesh"]
    sizes = {n: math.prod(s) for n, s in manifest["parameters"].items()}
    inner = sum(n for name, n in sizes.items() if name.startswith(PREFIX))
    of = f" of {manifest['steps']}" if manifest.get("steps") else ""
    network = f"{m.name}: {m.n_layer} blocks, {m.n_head} heads, width {m.dim}, {m.vocab_size} codes, "
    network += f"{m.num_classes} classes, {m.image_tokens} tokens"
    network += f", head factorised {m.head_factors}" if m.head != "full" else ""
    network += f", {cfg.token_order.text}" if cfg.token_order.kind == "random" else ""
    states = ", ".join(STATES)
    if optimizer_of(manifest) == "muon":
        states += "; of the blocks' matrices momentum_buffer in place of exp_avg and exp_avg_sq"
    out = {
        "checkpoint": str(folder),
        "step": f"{manifest['step']}{of}, {manifest['step'] * cfg.train.global_batch:,} images seen",
        "network": network,
        "objective": cfg.objective,
        "mesh": f"{mesh['data']} data x {mesh['tensor']} tensor ranks, ZeRO stage {mesh.get('zero_stage', '?')}",
        "dtype": f"compute {manifest.get('dtype', '?').removeprefix('torch.')}, stored in fp32: weights, {states}",
        "parameters": f"{inner:,} transformer + {sum(sizes.values()) - inner:,} projector, in {len(sizes)} tensors",
        "bytes": f"{sum(e['bytes'] for e in manifest['files'].values()):,} in {len(manifest['files'])} files",
    }
    if "val_loss_ar" in manifest:
        out["val_loss_ar"] = f"{manifest['val_loss_ar']:.4f}"
    if "converted" in manifest:
        source = manifest["converted"]
        out["converted"] = (
            f"from {source['from']}, {source['mesh']['data']} data x {source['mesh']['tensor']} tensor ranks"
        )
    if manifest.get("command"):
        out["command"] = manifest["command"]
    return out


# Weights files -----------------------------------------------------------------------------------------------------
def require_weights(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"weights {path} do not exist: name a run, a .safetensors file or a .pt file of LlamaGen")


def read_weights_header(path: Path) -> WeightsHeader:
    """Architecture, provenance and shapes of a .safetensors file of a network or a tokenizer. Raises ``UserError``."""
    require_weights(path)
    if read_header(path)[0].get("format") == TOKENIZER_FORMAT:
        return read_tokenizer_header(path)
    return read_model_header(path)


def read_any_header(path: Path) -> WeightsHeader:
    """``read_weights_header`` of a file, or the same of a folder in the Hub's layout. Raises ``UserError``."""
    return read_folder(path) if is_hub_folder(path) else read_weights_header(path)


def inspect_weights(path: Path, header: WeightsHeader, verify: bool, console: Console) -> bool:
    """Print what a weights file, or a folder in the Hub's layout, holds; False if it is damaged.

    ``verify``: compare the hash of a file with that in its .json, and those of a folder's files with those in config.json.
    """
    cfg, provenance, shapes = header
    count = sum(map(math.prod, shapes.values()))
    console.print_json(
        json.dumps({"parameters": count, "architecture": recorded(asdict(cfg)), "provenance": provenance}),
        ensure_ascii=True,
    )
    if not verify:
        return True
    if path.is_dir():
        return _verify_folder(path, console)
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{beside} does not exist: it records the hash of {path}; restore it, or leave out --verify")
    same: bool = read_json(beside, _BESIDE, "restore it", 16 << 20)["sha256"] == sha256(path)
    if same:
        console.print("complete: SHA-256 matches")
    else:
        console.print(
            f"{path} is damaged: its SHA-256 differs from the one in {beside.name}; copy it again", markup=False
        )
    return same


def _verify_folder(path: Path, console: Console) -> bool:
    """Of the Hub's layout; prints the outcome."""
    tokenizer, recorded_of = f"{TOKENIZER}/{TOKENIZER_FILE}", read_config(path).get("tokenizer", {})
    differ = f"its size or SHA-256 differs from the one in {CONFIG}"
    problems = [f"{path / name} is damaged: {differ}" for name in damaged_files(path)]
    if damaged_tokenizer(path):
        problems.append(f"{path / tokenizer} is damaged: {differ}")
    elif recorded_of and tokenizer_in(path) is None:
        problems.append(f"{path / tokenizer} does not exist, although {CONFIG} names a tokenizer")
    for problem in problems:
        console.print(f"{problem}; copy or download it again", markup=False, highlight=False, soft_wrap=True)
    if not problems:
        checked = (
            "weights and tokenizer"
            if "file_sha256" in recorded_of
            else f"weights; {CONFIG} has no hash of a tokenizer's file"
        )
        console.print(f"complete: SHA-256 matches ({checked})", markup=False, highlight=False, soft_wrap=True)
    return not problems
