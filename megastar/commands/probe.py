"""``megastar probe``."""

from __future__ import annotations

import json
from pathlib import Path

from megastar.commands.common import Parser, natural, positive
from megastar.errors import UserError

EXAMPLES = """
megastar probe runs/demo/run --shards runs/demo/codes/train --val-shards runs/demo/codes/val --block 3
megastar probe w.safetensors --shards data/imagenet256/train --val-shards data/imagenet256/val --out probe.json
"""


def parser() -> Parser:
    p = Parser(
        "probe", "Linear probe: how well one frozen block's features, with the null class, tell the class.", EXAMPLES
    )
    p.add_argument("source", help="run folder, checkpoint or .safetensors")
    p.add_argument("--shards", default=None, help="token shards to fit on (default: the run's)")
    p.add_argument("--val-shards", required=True, help="token shards to score on")
    p.add_argument("--block", type=positive, default=6, help="block, counted from 1 (default 6)")
    p.add_argument("--positions", type=positive, default=8, help="evenly spaced positions (default 8)")
    p.add_argument("--epochs", type=positive, default=90, help="passes over the features (default 90)")
    p.add_argument("--limit", type=positive, default=None, help="use at most this many pictures of each set")
    p.add_argument("--seed", type=natural, default=0, help="default 0")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the accuracies")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    from rich.console import Console
    from rich.table import Table

    from megastar.commands.sample import find_weights
    from megastar.device import pick_device
    from megastar.evaluation.linear_probe import linear_probe
    from megastar.model.io import load_model

    found = find_weights(a.source)
    shards = a.shards or found.shards
    if not shards:
        raise UserError("--shards is missing: a weights file does not know what to fit the probe on")
    console = Console()
    model, _ = load_model(found.file, pick_device(a.device))
    result = linear_probe(
        model,
        *centre_codes(shards, a.limit),
        *centre_codes(a.val_shards, a.limit),
        block=a.block,
        positions=a.positions,
        epochs=a.epochs,
        seed=a.seed,
        console=console,
    )
    table = Table("position", "accuracy", title=f"linear probe of block {a.block}, {result['val_pictures']} pictures")
    for position, accuracy in zip(result["positions"], result["accuracy"], strict=True):
        table.add_row(str(position), f"{accuracy:.2%}")
    console.print(table)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        about = {"weights": str(found.file), "shards": str(shards), "val_shards": a.val_shards}
        a.out.write_text(json.dumps(result | about, indent=1) + "\n")
    return 0


def centre_codes(shards: str, limit: int | None) -> tuple:
    """Codes (N, T) of each picture's centre crop, and classes (N,)."""
    import numpy as np

    from megastar.data.shard_set import ShardSet

    tokens = ShardSet(shards)
    count = min(len(tokens), limit or len(tokens))
    codes, labels = tokens.gather(np.arange(count), np.full((count, 1), tokens.manifest.centre_view))
    return codes[:, 0], labels
