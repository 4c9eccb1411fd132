"""``megastar probe``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._common import Parser, natural, positive
from megastar.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """
megastar probe runs/demo/run --shards runs/demo/codes/train --val-shards runs/demo/codes/val --block 3 --optimizer sgd
megastar probe w.safetensors --shards data/imagenet256/train --val-shards data/imagenet256/val --out probe.json
megastar probe runs/ar runs/star --names AR,ST-AR --val-shards data/imagenet256/val --figure probe.png --cache /scratch
megastar probe ar.json star.json --names AR,ST-AR --figure probe.png       (draws what --out wrote before)
"""


def parser() -> Parser:
    p = Parser(
        "probe", "Linear probe: how well one frozen block's features, with the null class, tell the class.", EXAMPLES
    )
    p.add_argument("source", nargs="+", help="run folders, checkpoints, .safetensors, or .json of earlier probes")
    p.add_argument("--names", default=None, help="what the table and the figure call them, with commas")
    p.add_argument("--shards", default=None, help="token shards to fit on (default: the run's)")
    p.add_argument("--val-shards", default=None, help="token shards to score on")
    p.add_argument("--block", type=positive, default=6, help="block, counted from 1 (default 6)")
    p.add_argument(
        "--positions", type=places, default=8, help="how many, evenly spaced, or which: 32,128,256 (default 8)"
    )
    p.add_argument("--epochs", type=positive, default=90, help="passes over the features (default 90)")
    p.add_argument("--batch", type=natural, default=0, help="pictures a step; 0: 16384, on small sets 1/78 of them")
    p.add_argument("--lr", type=float, default=0.0, help="peak learning rate; 0: 0.1 * batch / 256 (default 0)")
    p.add_argument(
        "--optimizer", choices=("lars", "sgd"), default="lars", help="lars as MAE; sgd for small sets (default lars)"
    )
    p.add_argument("--limit", type=positive, default=None, help="use at most this many pictures of each set")
    p.add_argument("--seed", type=natural, default=0, help="default 0")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--cache", type=Path, default=None, help="keep the features in this folder (default: in memory)")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the accuracies")
    p.add_argument("--figure", type=Path, default=None, help="PNG of accuracy over position")
    return p


def places(text: str) -> int | list[int]:
    """An argparse type: a number of positions, or a list of them."""
    words = text.split(",")
    if not all(w.strip().isdigit() for w in words):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of positions nor a list like 32,64")
    return positive(text) if len(words) == 1 else [int(w) for w in words]


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if not a.val_shards and not all(s.endswith(".json") for s in a.source):
        parser().error("the following arguments are required: --val-shards")
    names = [n.strip() for n in a.names.split(",")] if a.names else [Path(s).stem or s for s in a.source]
    if len(names) != len(a.source) or len(set(names)) != len(names):
        raise UserError(f"--names {','.join(names)}: {len(a.source)} sources need as many different names")
    if a.figure and a.figure.suffix.lower() != ".png":
        raise UserError(f"--figure {a.figure} must end in .png")
    from rich.console import Console

    from megastar.evaluation.figure import draw_probes
    from megastar.utils.files import write_atomic

    console = Console()
    results: dict[str, dict[str, Any]] = {}
    for name, source in zip(names, a.source, strict=True):
        results[name] = read_probe(source) if source.endswith(".json") else probe(source, a, console)
        if a.out:  # after each: an hour of probing is not lost with the next one
            a.out.parent.mkdir(parents=True, exist_ok=True)
            told = results[name] if len(names) == 1 else {"runs": results}
            write_atomic(a.out, (json.dumps(told, indent=1) + "\n").encode())
    show(results, console)
    if a.figure:
        draw_probes(results, a.figure)
        console.print(f"figure: {a.figure}", markup=False, highlight=False)
    return 0


def probe(source: str, a: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The probe of one run or weights file, with where everything came from."""
    from megastar.checkpoint.find_weights import find_weights
    from megastar.evaluation.linear_probe import linear_probe
    from megastar.model.io import load_model
    from megastar.utils.device import pick_device
    from megastar.utils.files import sha256

    found = find_weights(source)
    shards = a.shards or found.shards
    if not shards:
        raise UserError("--shards is missing: a weights file does not know what to fit the probe on")
    model, _ = load_model(found.file, pick_device(a.device))
    result = linear_probe(
        model,
        *centre_codes(shards, a.limit),
        *centre_codes(a.val_shards, a.limit),
        block=a.block,
        positions=a.positions,
        epochs=a.epochs,
        batch=a.batch,
        lr=a.lr,
        optimizer=a.optimizer,
        seed=a.seed,
        cache=a.cache,
        console=console,
    )
    return result | {
        "weights": str(found.file),
        "weights_sha256": sha256(found.file),
        "shards": str(shards),
        "val_shards": a.val_shards,
    }


def read_probe(path: str) -> dict[str, Any]:
    """An earlier result. Raises ``UserError``."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the --out of an earlier probe") from error
    known = isinstance(result, dict) and {"positions", "accuracy", "block"} <= result.keys()
    if not known or len(result["positions"]) != len(result["accuracy"]):
        raise UserError(f"{path} is not the probe of one run: name the --out of an earlier probe of one source")
    return result


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """A table: a row a position, a column a run."""
    from rich.table import Table

    blocks = sorted({r["block"] for r in results.values()})
    table = Table("position", *results, title=f"linear probe of block {', '.join(map(str, blocks))}")
    for position in sorted({p for r in results.values() for p in r["positions"]}):
        at = [dict(zip(r["positions"], r["accuracy"], strict=True)).get(position) for r in results.values()]
        table.add_row(str(position), *("" if v is None else f"{v:.2%}" for v in at))
    console.print(table)


def centre_codes(shards: str, limit: int | None) -> tuple:
    """Codes (N, T) of each picture's centre crop, and classes (N,)."""
    import numpy as np

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards)
    count = min(len(tokens), limit or len(tokens))
    codes, labels = tokens.gather(np.arange(count), np.full((count, 1), tokens.manifest.centre_view))
    return codes[:, 0], labels
