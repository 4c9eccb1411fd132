"""``megastar data``: inspect, verify, count and index token shards."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import Parser, bounded, positive, print_table
from megastar.commands._shared.json_output import SetReport, only_json
from megastar.commands._shared.outputs import check_outputs
from megastar.config.knob import MOST_SECONDS
from megastar.config.schema import DataConfig
from megastar.errors import UserError, nearest
from megastar.utils.printable import one_line, say

if TYPE_CHECKING:
    from rich.console import Console

    from megastar.data.shards.manifest import Manifest
    from megastar.data.shards.reader import ShardSet

ACTIONS = {
    "inspect": "show what a set holds, from its manifest and first samples",
    "verify": "read every byte and report damaged shards; exit status 1 if there are any",
    "stats": "count classes and codes, find duplicates, write a sheet of images",
    "index": "write manifest.json and indexes for WebDataset shards of another program",
}
USAGE = """usage: megastar data ACTION SET ...

{actions}

SET is a folder of token shards, or s3://bucket/prefix.

examples:
{examples}

See megastar data ACTION --help for its options."""
EXAMPLES = {
    "inspect": """\
megastar data inspect runs/demo/codes/train
megastar data inspect s3://codes/imagenet256/train --samples 20
megastar data inspect runs/demo/codes/train --json | jq .samples
""",
    "verify": """\
megastar data verify runs/demo/codes/train
megastar data verify s3://codes/imagenet256/train && sbatch slurm/train_b.sh
""",
    "stats": """\
megastar data stats runs/demo/codes/train
megastar data stats runs/demo/codes/train --tokenizer assets/tokenizer/emoji64-vq.safetensors --sheet sheet.png
megastar data stats s3://codes/imagenet256/train --cache /scratch/codes --json > stats.json
""",
    "index": """\
megastar data index other/shards --tokenizer data/tokenizer/vq16.safetensors
megastar data index s3://codes/other --codebook-size 16384 --classes names.txt
megastar data index other/shards --codebook-size 16384 --image-size 256 --centre-view 2
""",
}


def parser(action: str) -> Parser:
    p = Parser(f"data {action}", ACTIONS[action][0].upper() + ACTIONS[action][1:] + ".", EXAMPLES[action])
    p.add_argument("set", metavar="SET", help="folder of token shards, or s3://bucket/prefix")
    if action != "verify":
        p.add_argument("--cache", default="", help="cache folder for s3:// (default: a folder under $TMPDIR)")
    p.add_argument(
        "--patience", type=bounded(float, 0, MOST_SECONDS), default=DataConfig().patience,
        help="seconds to wait for an unreachable s3://",
    )  # fmt: skip
    if action == "index":
        from megastar.data.shards.sample_parser import LAYOUTS

        p.add_argument("--tokenizer", help="tokenizer .safetensors that encoded the images")
        p.add_argument("--codebook-size", type=positive, help="instead of --tokenizer: number of codes")
        p.add_argument("--layout", choices=LAYOUTS, default="plain", help="shard layout")
        p.add_argument("--crops", default="foreign", help="crops, if known: ten:1.1, center-flip, ...")
        p.add_argument(
            "--centre-view", type=bounded(int, 0, 1023),
            help="number of the unmirrored centre crop, counted from 0 (default: that of --crops, else 0)",
        )  # fmt: skip
        p.add_argument(
            "--image-size", type=bounded(int, 1, 8192), help="without --tokenizer: side of the images in pixels"
        )
        p.add_argument("--classes", help="file with one class name per line (default: numbers)")
        return p
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    if action == "inspect":
        p.add_argument("--samples", type=positive, default=5, help="samples to show")
    if action == "stats":
        p.add_argument("--top", type=positive, default=8, help="number of most and least frequent codes and classes")
        p.add_argument("--tokenizer", help="tokenizer .safetensors, for --sheet")
        p.add_argument("--sheet", type=Path, help="PNG file for decoded images, one row per class")
        p.add_argument("--per-class", type=positive, default=8, help="images per class in the sheet")
        p.add_argument("--rows", type=positive, default=24, help="classes in the sheet, evenly spaced")
    return p


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, ACTIONS)) + 2
        actions = "\n".join(f"  {name:<{width}}{what}" for name, what in ACTIONS.items())
        print(USAGE.format(actions=actions, examples=textwrap.indent("".join(EXAMPLES.values()).strip(), "  ")))
        raise SystemExit(0)  # as argparse does
    if words[0] not in ACTIONS:
        raise UserError(f"unknown action {words[0]!r} of megastar data: {nearest(words[0], ACTIONS)}")
    from megastar.commands._shared.data_stats import stats
    from megastar.utils.console import PlainConsole

    console = PlainConsole(stderr=True)  # for progress; standard output is for results
    a = parser(words[0]).parse(words[1:], console)
    check_outputs({}, folders={"--cache": getattr(a, "cache", "")})
    data = DataConfig(cache=getattr(a, "cache", ""), patience=a.patience)
    return {"inspect": inspect, "verify": check, "stats": stats, "index": index}[words[0]](a, data, console)


# inspect -----------------------------------------------------------------------------------------------------------
def inspect(a: argparse.Namespace, data: DataConfig, console: Console) -> int:
    from contextlib import closing

    from rich.filesize import decimal

    from megastar.data.shards.class_counts import class_summary, count_classes
    from megastar.data.shards.reader import ShardSet

    with only_json(a.json) as print_json, closing(ShardSet(a.set, data=data, max_open=1)) as shards:
        rows, first = describe(shards.manifest), first_samples(shards, a.samples)
        summary = class_summary(shards.store, shards.manifest)
        counts = count_classes(shards.store, shards.manifest)
        if a.json:
            print_json(SetReport(set=a.set, **rows, class_counts=counts, first=first))
            return 0
    names, made_by, skipped = (rows.pop(name) for name in ("class_names", "made_by", "skipped"))
    stored = shards.manifest.stored_features
    rows["features"] = f"{stored}, {decimal(stored.bytes)} a crop" if stored else "none"
    rows["bytes"] = decimal(rows["bytes"])
    rows["classes"] = f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    rows["skipped images"] = len(skipped)
    rows |= {f"made by: {name}": value for name, value in made_by.items()}
    print_table(a.set, {name.replace("_", " "): value for name, value in rows.items()})
    samples = {str(s["id"]): f"{s['source']}  class {s['class']} {s['class_name']}" for s in first}
    print_table("\nfirst samples", samples)
    say(one_line(summary))
    return 0


def describe(m: Manifest) -> dict[str, Any]:
    """The manifest's content, without its list of shards."""
    sizes = m.shard_sizes
    same = ("layout", "dtype", "views", "crops", "tokens", "codebook_size", "image_size", "made_by", "skipped")
    return {
        "samples": m.samples,
        "shards": len(m.shards),
        "samples_a_shard": f"{min(sizes)} to {max(sizes)}" if min(sizes) != max(sizes) else f"{max(sizes)}",
        "bytes": sum(s.bytes for s in m.shards),
        "classes": len(m.classes),
        "class_names": m.classes,
        "grid": f"{m.grid} x {m.grid}",
        "tokenizer_sha256": m.tokenizer_sha256 or "not recorded",
        "features": m.features,
        **{name: getattr(m, name) for name in same},
    }


def first_samples(shards: ShardSet, n: int) -> list[dict[str, Any]]:
    """Id, source and class of the first samples of the first non-empty shard."""
    m = shards.manifest
    shard = next(i for i, s in enumerate(m.shards) if s.samples)
    found = []
    for row, source in enumerate(shards.sources(shard)[:n]):
        _, label, sample = shards.read(shard, row)
        name = m.classes[label] if 0 <= label < len(m.classes) else "(out of range)"
        found.append({"id": sample, "source": source, "class": label, "class_name": name})
    return found


# verify ------------------------------------------------------------------------------------------------------------
def check(a: argparse.Namespace, data: DataConfig, console: Console) -> int:
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.shards.verify import verify

    manifest = load_manifest(a.set, data)
    problems = verify(a.set, data, console)
    broken = list(dict.fromkeys(p.shard for p in problems))
    if a.json:
        report = {"set": a.set, "shards": len(manifest.shards), "samples": manifest.samples, "broken": len(broken)}
        print(json.dumps(report | {"problems": [p._asdict() for p in problems]}, indent=1))
    else:
        for problem in problems:
            say(one_line(str(problem)))
        good = f"{len(manifest.shards)} shards, {manifest.samples} samples: all match the manifest"
        bad = (
            f"{len(broken)} of {len(manifest.shards)} shards are damaged: copy them again, or remove them "
            f"(rm -f {shlex.join(broken)}) and repeat megastar pretokenize, which writes missing shards only"
        )
        say(bad if problems else good)
    return 1 if problems else 0


# index -------------------------------------------------------------------------------------------------------------
def index(a: argparse.Namespace, data: DataConfig, console: Console) -> int:
    from megastar.data.shards.class_names import read_class_names

    classes = None if a.classes is None else read_class_names(a.classes)
    if "://" not in a.set and Path(a.set).is_dir():
        check_outputs({}, folders={"SET": a.set})
    from megastar.checkpoint.hub.download import local_tokenizer
    from megastar.data.shards.import_webdataset import index_webdataset

    tokenizer = local_tokenizer(a.tokenizer) if a.tokenizer else None
    manifest = index_webdataset(
        a.set, tokenizer=tokenizer, codebook_size=a.codebook_size, classes=classes, layout=a.layout, crops=a.crops,
        centre_view=a.centre_view, image_size=a.image_size, data=data, console=console,
    )  # fmt: skip
    print_table(
        a.set,
        {k: v for k, v in describe(manifest).items() if k not in ("class_names", "made_by", "skipped", "features")},
    )
    return 0
