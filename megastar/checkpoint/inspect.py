"""Print what a checkpoint holds, its provenance and the health of its files. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megastar.checkpoint.shard_format import PREFIX, STATES, StateReader
from megastar.config.load import config_from_dict
from megastar.errors import UserError
from megastar.run_dir.checkpoint_dir import find_checkpoint, parse_manifest
from megastar.utils.files import sha256
from megastar.utils.progress_bar import progress_bar


def inspect(path: Path, verify: bool, console: Console) -> bool:
    """Print the checkpoint in ``path``; returns whether it is complete. ``verify`` compares hashes, not only sizes.

    Raises ``UserError`` if there is none, and for an unreadable manifest.
    """
    folder = find_checkpoint(Path(path))
    manifest = parse_manifest(folder)
    health, total = {}, sum(entry["bytes"] for entry in manifest["files"].values())
    with progress_bar(console if verify else None, "hashing", total, bytes=True, transient=True) as bar:
        for name, entry in manifest["files"].items():
            health[name] = health_of(folder / name, entry, verify)
            bar.advance(entry["bytes"])
    problem = "damaged: see the files below; restore them, or resume from an earlier checkpoint"
    if all(h.startswith("ok") for h in health.values()):
        try:
            StateReader(folder, manifest).close()
            problem = ""
        except UserError as error:
            problem = str(error)
    head = Table("", "", show_header=False, box=None)
    head.columns[1].overflow = "fold"  # do not shorten paths
    for name, value in summary(folder, manifest).items():
        head.add_row(name, value)
    checked = ", SHA-256 too" if verify else "; --verify compares hashes too"
    head.add_row("health", problem or f"complete: names and sizes match{checked}")
    console.print(head)
    files = Table("file", "written by", "MB", "health", title="files")
    for name, entry in manifest["files"].items():
        files.add_row(name, entry["whose"], f"{entry['bytes'] / 1e6:.2f}", health[name])
    console.print(files)
    return not problem


def health_of(file: Path, entry: dict[str, Any], verify: bool) -> str:
    if not file.is_file():
        return "missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{size} bytes, not {entry['bytes']}"
    if not verify:
        return "ok (size)"
    return "ok (SHA-256)" if sha256(file) == entry["sha256"] else "SHA-256 differs"


def summary(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The manifest's content by the configuration's names."""
    cfg, mesh = config_from_dict(manifest["config"]), manifest["mesh"]
    m = cfg.model
    sizes = {n: math.prod(s) for n, s in manifest["parameters"].items()}
    inner = sum(n for name, n in sizes.items() if name.startswith(PREFIX))
    of = f" of {manifest['steps']}" if manifest.get("steps") else ""
    network = f"{m.name}: {m.n_layer} blocks, {m.n_head} heads, width {m.dim}, {m.vocab_size} codes, "
    network += f"{m.num_classes} classes, {m.image_tokens} tokens"
    out = {
        "checkpoint": str(folder),
        "step": f"{manifest['step']}{of}, {manifest['step'] * cfg.train.global_batch:,} images seen",
        "network": network,
        "objective": "ST-AR (self-guided)" if cfg.self_guided.enabled else "next token (AR baseline)",
        "mesh": f"{mesh['data']} data x {mesh['tensor']} tensor ranks, ZeRO stage {mesh.get('zero_stage', '?')}",
        "dtype": f"compute {manifest.get('dtype', '?').removeprefix('torch.')}, stored in fp32: weights, {', '.join(STATES)}",
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
