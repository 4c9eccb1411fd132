"""What a checkpoint holds, for a person: its network, who wrote it, and whether its files are what was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megastar.checkpoint.atomic_output import byte_bar
from megastar.checkpoint.shard_format import STATES, StateReader
from megastar.checkpoint.source import PREFIX
from megastar.config.load import config_from_dict
from megastar.errors import UserError
from megastar.run_dir.checkpoint_dir import find_checkpoint, parse_manifest
from megastar.utils.files import sha256


def inspect(path: Path, verify: bool, console: Console) -> bool:
    """Print the checkpoint in ``path``; whether it is whole. ``verify`` compares hashes too, not only sizes.

    Raises ``UserError`` where there is none, and for a manifest that cannot be read.
    """
    folder = find_checkpoint(Path(path))
    about = parse_manifest(folder)
    with byte_bar(console, "hashing", sum(e["bytes"] for e in about["files"].values()) if verify else 0) as advance:
        health = {}
        for name, entry in about["files"].items():
            health[name] = health_of(folder / name, entry, verify)
            advance(entry["bytes"] if verify else 0)
    problem = ""
    if all(h.startswith("ok") for h in health.values()):
        try:
            StateReader(folder, about).close()
        except UserError as error:
            problem = str(error)
    head = Table("", "", show_header=False, box=None)
    head.columns[1].overflow = "fold"  # paths keep their ends
    for name, value in summary(folder, about).items():
        head.add_row(name, value)
    whole = not problem and all(h.startswith("ok") for h in health.values())
    if not whole:
        verdict = problem or "damaged: see the files below; restore them, or resume from an earlier checkpoint"
    else:
        verdict = "whole: all names and sizes" + (", SHA-256" if verify else "; --verify compares hashes too")
    head.add_row("health", verdict)
    console.print(head)
    files = Table("file", "written by", "MB", "health", title="files")
    for name, entry in about["files"].items():
        files.add_row(name, entry["whose"], f"{entry['bytes'] / 1e6:.2f}", health[name])
    console.print(files)
    return whole


def health_of(file: Path, entry: dict[str, Any], verify: bool) -> str:
    if not file.is_file():
        return "missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{size} bytes, not {entry['bytes']}"
    if not verify:
        return "ok (size)"
    return "ok (SHA-256)" if sha256(file) == entry["sha256"] else "SHA-256 differs"


def summary(folder: Path, about: dict[str, Any]) -> dict[str, str]:
    """What the manifest says, by the names that the configuration uses."""
    cfg, mesh = config_from_dict(about["config"]), about["mesh"]
    m = cfg.model
    sizes = {n: math.prod(s) for n, s in about["parameters"].items()}
    inner = sum(n for name, n in sizes.items() if name.startswith(PREFIX))
    of = f" of {about['steps']}" if about.get("steps") else ""
    network = f"{m.name}: {m.n_layer} blocks, {m.n_head} heads, width {m.dim}, {m.vocab_size} codes, "
    network += f"{m.num_classes} classes, {m.image_tokens} tokens"
    out = {
        "checkpoint": str(folder),
        "step": f"{about['step']}{of}, {about['step'] * cfg.train.global_batch:,} images seen",
        "network": network,
        "objective": "ST-AR (self-guided)" if cfg.self_guided.enabled else "next token (AR baseline)",
        "mesh": f"{mesh['data']} data x {mesh['tensor']} tensor ranks, ZeRO stage {mesh.get('zero_stage', '?')}",
        "dtype": f"computed in {about.get('dtype', '?').removeprefix('torch.')}, stored in fp32: weights, {', '.join(STATES)}",
        "parameters": f"{inner:,} transformer + {sum(sizes.values()) - inner:,} projector, in {len(sizes)} tensors",
        "bytes": f"{sum(e['bytes'] for e in about['files'].values()):,} in {len(about['files'])} files",
    }
    if "val_loss_ar" in about:
        out["val_loss_ar"] = f"{about['val_loss_ar']:.4f}"
    if "converted" in about:
        was = about["converted"]
        out["converted"] = f"from {was['from']}, {was['mesh']['data']} data x {was['mesh']['tensor']} tensor ranks"
    if about.get("command"):
        out["command"] = about["command"]
    return out
