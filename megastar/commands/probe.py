"""``megastar probe``: linear probe of a model's features."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import MOST, Parser, bounded, natural, positive, seed
from megastar.commands._shared.outputs import check_outputs
from megastar.config.convert import shown
from megastar.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

EXAMPLES = """
megastar probe runs/demo/run --shards runs/demo/codes/train --val-shards runs/demo/codes/val --block 3 --optimizer sgd
megastar probe w.safetensors --shards data/imagenet256/train --val-shards data/imagenet256/val --out probe.json
megastar probe runs/ar runs/star --names AR,ST-AR --val-shards data/imagenet256/val --figure probe.png --cache /scratch
megastar probe ar.json star.json --names AR,ST-AR --figure probe.png       (plots results that --out wrote)
"""


def parser() -> Parser:
    p = Parser(
        "probe", "Train a linear classifier on one frozen block's features, computed with the null class.", EXAMPLES
    )
    p.add_argument(
        "source",
        nargs="+",
        help="run folders, checkpoints, .safetensors, folders of convert --to hf, hf://owner/name, or .json files (earlier probes)",
    )
    p.add_argument("--names", help="comma-separated names for the table and the figure")
    p.add_argument("--shards", help="training token shards (default: the run's)")
    p.add_argument("--val-shards", help="validation token shards")
    p.add_argument("--block", type=positive, default=6, help="block, counted from 1")
    p.add_argument("--positions", type=places, default=8, help="number of evenly spaced positions, or a list: 32,128")
    p.add_argument("--epochs", type=positive, default=90, help="training epochs")
    p.add_argument("--batch", type=natural, default=0, help="batch size; 0: 16384, or 1/78 of a small set")
    p.add_argument("--lr", type=bounded(float, 0, MOST), default=0.0, help="peak learning rate; 0: 0.1 * batch / 256")
    p.add_argument(
        "--optimizer", choices=("lars", "sgd"), default="lars", help="lars (as in MAE), or sgd for small sets"
    )
    p.add_argument("--limit", type=positive, help="use at most this many images of each set")
    p.add_argument("--seed", type=seed, default=0, help="random seed")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--cache", type=Path, help="folder to cache the features in (default: in memory)")
    p.add_argument("--out", type=Path, help="JSON file for the accuracies")
    p.add_argument("--figure", type=Path, help="PNG file for a plot of accuracy over position")
    return p


def places(text: str) -> int | list[int]:
    """An argparse type: a number of positions, or a list of them."""
    try:
        numbers = [bounded(int, 1, 65536)(word) for word in text.split(",")]
    except argparse.ArgumentTypeError:
        message = f"{shown(text)} is neither a number of positions nor a list like 32,64"
        raise argparse.ArgumentTypeError(message) from None
    return numbers[0] if len(numbers) == 1 else numbers


def main(words: list[str]) -> int:
    a = parser().parse(words)
    if not a.val_shards and not all(s.endswith(".json") for s in a.source):
        parser().error("the following arguments are required: --val-shards")
    names = [n.strip() for n in a.names.split(",")] if a.names else [Path(s).stem or s for s in a.source]
    if len(names) != len(a.source) or len(set(names)) != len(names):
        raise UserError(f"--names {','.join(names)}: give {len(a.source)} different names, one for each source")
    if a.figure and a.figure.suffix.lower() != ".png":
        raise UserError(f"--figure {a.figure} must end in .png")
    check_outputs({"--out": a.out, "--figure": a.figure}, *a.source, folders={"--cache": a.cache})
    from megastar.evaluation.figure import draw_probes, require_matplotlib
    from megastar.utils.files import write_json
    from megastar.utils.logs import shared_console

    if a.figure:
        require_matplotlib()
    console = shared_console()
    results: dict[str, dict[str, Any]] = {}
    for name, source in zip(names, a.source, strict=True):
        results[name] = read_probe(source) if source.endswith(".json") else probe(source, a, console)
        if a.out:  # after each source, so that a later failure loses nothing
            write_json(a.out, results[name] if len(names) == 1 else {"runs": results})
    show(results, console)
    if a.figure:
        draw_probes(results, a.figure)
        console.print(f"figure: {a.figure}", markup=False, highlight=False)
    return 0


def probe(source: str, a: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Probe one run or weights file; returns the result with its provenance."""
    from megastar.checkpoint.find_weights import check_codes, find_weights
    from megastar.data.shards.class_names import check_same_classes, first_difference
    from megastar.data.shards.manifest import load_manifest
    from megastar.evaluation.linear_probe import linear_probe, load_crops
    from megastar.utils.device import pick_device
    from megastar.utils.files import sha256

    found = find_weights(source)
    shards = a.shards or found.shards
    if not shards:
        raise UserError(f"{source} is weights without a run, which record no training shards: give --shards")
    found.require_null_class("a probe needs")
    for folder in (shards, a.val_shards):
        check_codes(found.file, found.identity, folder, found.data)
    sets = [load_manifest(folder, found.data) for folder in (shards, a.val_shards)]
    names, others = (m.classes for m in sets)
    check_same_classes(shards, names, a.val_shards, others)
    if {s.sha256 for s in sets[0].shards} & {s.sha256 for s in sets[1].shards}:
        logger.warning(
            "%s has shards of %s: the probe is scored on images that it is fitted on, which says little about the features",
            a.val_shards, shards,
        )  # fmt: skip
    if difference := first_difference(found.provenance.get("classes") or [], names):
        logger.warning(
            "%s was trained on other classes than %s has, for example class %d, %r instead of %r: its features are probed "
            "for those of the shards", found.file, shards, *difference,
        )  # fmt: skip
    model = found.load(pick_device(a.device))
    options = {k: getattr(a, k) for k in ("block", "positions", "epochs", "batch", "lr", "optimizer", "seed", "cache")}
    train, val = (load_crops(folder, limit=a.limit, data=found.data) for folder in (shards, a.val_shards))
    result = linear_probe(model, *train, *val, console=console, **options)
    weights = {"weights": str(found.file), "weights_sha256": sha256(found.digest_file)}
    return result | weights | {"shards": str(shards), "val_shards": a.val_shards}


def read_probe(path: str) -> dict[str, Any]:
    """An earlier result. Raises ``UserError``."""
    from megastar.utils.json_file import FLOAT, integer, list_of, read_json, record, validator

    schema = validator(record({"positions": list_of(integer(1)), "accuracy": list_of(FLOAT), "block": integer(1)}))
    result: dict[str, Any] = read_json(Path(path), schema, "give the --out file of an earlier probe of one source")
    if len(result["positions"]) != len(result["accuracy"]):
        raise UserError(f"{path} is not the result of a probe of one source: give the --out file of such a probe")
    return result


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a table with a row per position and a column per run."""
    from rich.table import Table

    blocks = sorted({r["block"] for r in results.values()})
    table = Table("position", *results, title=f"linear probe of block {', '.join(map(str, blocks))}")
    for position in sorted({p for r in results.values() for p in r["positions"]}):
        at = [dict(zip(r["positions"], r["accuracy"], strict=True)).get(position) for r in results.values()]
        table.add_row(str(position), *("" if v is None else f"{v:.2%}" for v in at))
    console.print(table)
