"""``megastar data``: look into token shards, check them, count them, and index those of other writers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._common import Parser, nearest, positive
from megastar.config.schema import DataConfig
from megastar.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from megastar.data.shards.manifest import Manifest
    from megastar.data.shards.stats import Stats

ACTIONS = {
    "inspect": "what a set holds, from its manifest and its first samples",
    "verify": "read every byte and name every shard that is broken; exit status 1 if there is one",
    "stats": "count classes and codes, find duplicates, draw a sheet of pictures",
    "index": "write manifest.json and indexes for WebDataset shards that another program made",
}
USAGE = """usage: megastar data ACTION SET ...

{actions}

SET is a folder of token shards, or s3://bucket/prefix.

examples:
  megastar data inspect runs/demo/codes/train
  megastar data verify s3://codes/imagenet256/train
  megastar data stats runs/demo/codes/train --tokenizer assets/tokenizer/emoji64-vq.safetensors --sheet sheet.png
  megastar data index foreign/shards --tokenizer data/tokenizer/vq16.safetensors

megastar data ACTION --help tells more."""
EXAMPLES = {
    "inspect": """
megastar data inspect runs/demo/codes/train
megastar data inspect s3://codes/imagenet256/train --samples 20
megastar data inspect runs/demo/codes/train --json | jq .samples
""",
    "verify": """
megastar data verify runs/demo/codes/train
megastar data verify s3://codes/imagenet256/train && sbatch slurm/train_b.sh
""",
    "stats": """
megastar data stats runs/demo/codes/train
megastar data stats runs/demo/codes/train --tokenizer assets/tokenizer/emoji64-vq.safetensors --sheet sheet.png
megastar data stats s3://codes/imagenet256/train --cache /scratch/codes --json > stats.json
""",
    "index": """
megastar data index foreign/shards --tokenizer data/tokenizer/vq16.safetensors
megastar data index s3://codes/foreign --codebook-size 16384 --classes names.txt
""",
}


def parser(action: str) -> Parser:
    p = Parser(f"data {action}", ACTIONS[action][0].upper() + ACTIONS[action][1:] + ".", EXAMPLES[action])
    p.add_argument("set", metavar="SET", help="folder of token shards, or s3://bucket/prefix")
    default = DataConfig()
    if action != "verify":
        p.add_argument(
            "--cache", default="", help="folder that keeps shards read from s3:// (default: in the temp folder)"
        )
    p.add_argument(
        "--patience", type=float, default=default.patience,
        help=f"seconds that an outage of s3:// is waited out (default {default.patience:g})",
    )  # fmt: skip
    if action == "index":
        from megastar.data.shards.sample_parser import LAYOUTS

        p.add_argument("--tokenizer", default=None, help="tokenizer .safetensors that made the codes")
        p.add_argument("--codebook-size", type=positive, default=None, help="instead of --tokenizer: number of codes")
        p.add_argument(
            "--layout", choices=LAYOUTS, default="plain", help="how a shard holds its samples (default plain)"
        )
        p.add_argument("--crops", default="foreign", help="how the views were cut, if known: ten:1.1, center-flip, ...")
        p.add_argument("--classes", default=None, help="file with a class name a line (default: numbers)")
        return p
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    if action == "inspect":
        p.add_argument("--samples", type=positive, default=5, help="first samples that are shown (default 5)")
    if action == "stats":
        p.add_argument("--top", type=positive, default=8, help="codes and classes shown at either end (default 8)")
        p.add_argument("--tokenizer", default=None, help="tokenizer .safetensors, for --sheet")
        p.add_argument("--sheet", type=Path, default=None, help="PNG to write: stored pictures, decoded, a row a class")
        p.add_argument("--per-class", type=positive, default=8, help="pictures of a class in the sheet (default 8)")
        p.add_argument("--rows", type=positive, default=24, help="classes in the sheet, spread over all (default 24)")
    return p


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, ACTIONS)) + 2
        print(USAGE.format(actions="\n".join(f"  {name:<{width}}{what}" for name, what in ACTIONS.items())))
        raise SystemExit(0)  # as every command's parser does
    if words[0] not in ACTIONS:
        raise UserError(f"unknown action {words[0]!r} of megastar data: {nearest(words[0], ACTIONS)}")
    a = parser(words[0]).parse_args(words[1:])
    if not a.patience >= 0:
        raise UserError(f"--patience {a.patience:g} must be 0 or more seconds")
    from rich.console import Console

    console = Console(stderr=True)  # bars; standard output is for what was asked
    return {"inspect": inspect, "verify": check, "stats": stats, "index": index}[words[0]](a, console)


def _config(a: argparse.Namespace) -> DataConfig:
    return DataConfig(cache=getattr(a, "cache", ""), patience=a.patience)


def _print_table(title: str, rows: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(_printable(str(name)), _printable(str(value)))
    # Lines that a program reads stay whole.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    console.print(title, table, sep="\n")


def _printable(text: str) -> str:
    """Names come from afar: what would steer the terminal is shown as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def size_of(n: int) -> str:
    """1234567 -> "1.23 MB"."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n >= 1000**power:
            return f"{n / 1000**power:.3g} {unit}"
    return f"{n} bytes"


# inspect -----------------------------------------------------------------------------------------------------------
def inspect(a: argparse.Namespace, console: Console) -> int:
    from contextlib import closing

    from megastar.data.shards.reader import ShardSet

    with closing(ShardSet(a.set, data=_config(a), max_open=1)) as shards:
        about = describe(shards.manifest)
        about["first"] = first_samples(shards, a.samples)
    if a.json:
        print(json.dumps({"set": a.set, **about}, indent=1, ensure_ascii=False))
        return 0
    names = about.pop("class_names")
    first, made_by, skipped = about.pop("first"), about.pop("made_by"), about.pop("skipped")
    about["bytes"] = size_of(about["bytes"])
    about["classes"] = f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    about["skipped pictures"] = len(skipped)
    about |= {f"made by: {name}": value for name, value in made_by.items()}
    _print_table(a.set, {name.replace("_", " "): value for name, value in about.items()})
    _print_table(
        "\nfirst samples", {f"{s['id']}": f"{s['source']}  class {s['class']} {s['class_name']}" for s in first}
    )
    return 0


def describe(m: Manifest) -> dict[str, Any]:
    """What the manifest says, without its list of shards."""
    sizes = m.shard_sizes
    return {
        "samples": m.samples,
        "shards": len(m.shards),
        "samples_a_shard": f"{min(sizes)} to {max(sizes)}" if min(sizes) != max(sizes) else f"{max(sizes)}",
        "bytes": sum(s.bytes for s in m.shards),
        "layout": m.layout,
        "dtype": m.dtype,
        "classes": len(m.classes),
        "class_names": m.classes,
        "views": m.views,
        "crops": m.crops,
        "grid": f"{m.grid} x {m.grid}",
        "tokens": m.tokens,
        "codebook_size": m.codebook_size,
        "image_size": m.image_size,
        "tokenizer_sha256": m.tokenizer_sha256 or "not named",
        "made_by": m.made_by,
        "skipped": m.skipped,
    }


def first_samples(shards: Any, n: int) -> list[dict[str, Any]]:
    """Id, source and class of the first samples of the first shard that holds any."""
    m = shards.manifest
    shard = next(i for i, s in enumerate(m.shards) if s.samples)
    found = []
    for row, source in enumerate(shards.sources(shard)[:n]):
        _, label, sample = shards.read(shard, row)
        name = m.classes[label] if 0 <= label < len(m.classes) else "(outside the classes)"
        found.append({"id": sample, "source": source, "class": label, "class_name": name})
    return found


# verify ------------------------------------------------------------------------------------------------------------
def check(a: argparse.Namespace, console: Console) -> int:
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.shards.verify import verify

    manifest = load_manifest(a.set, _config(a))
    problems = verify(a.set, _config(a), console)
    broken = len({p.shard for p in problems})
    if a.json:
        report = {"set": a.set, "shards": len(manifest.shards), "samples": manifest.samples, "broken": broken}
        print(json.dumps(report | {"problems": [p._asdict() for p in problems]}, indent=1, ensure_ascii=False))
    else:
        for problem in problems:
            print(problem)
        good = f"{len(manifest.shards)} shards, {manifest.samples} samples: every byte is as the manifest says"
        bad = f"{broken} of {len(manifest.shards)} shards are broken: copy them again, or delete them and pretokenize again"
        print(bad if problems else good)
    return 1 if problems else 0


# stats -------------------------------------------------------------------------------------------------------------
def stats(a: argparse.Namespace, console: Console) -> int:
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.shards.stats import count

    if bool(a.sheet) != bool(a.tokenizer):
        raise UserError("--sheet and --tokenizer belong together: the codes are decoded with their tokenizer")
    manifest = load_manifest(a.set, _config(a))
    if a.tokenizer:
        check_tokenizer(manifest, a.tokenizer, a.set)
    found = count(a.set, _config(a), console)
    if a.sheet:
        draw_sheet(a, manifest, found.labels)
    report = summary(manifest, found, a.top)
    if a.json:
        report |= {
            "set": a.set,
            "samples_of_each_class": found.classes.tolist(),
            "uses_of_each_code": found.codes.tolist(),
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return 0
    codes, classes, duplicates = report["codes"], report["classes"], report["duplicates"]
    _print_table(
        a.set,
        {
            "samples": report["samples"],
            "classes": f"{classes['used']} of {len(manifest.classes)} used",
            "samples a class": "least {min}, median {median:g}, most {max}".format(**classes),
            "codes": f"{codes['used']} of {manifest.codebook_size} used ({100 * codes['usage']:.1f} %)",
            "entropy": f"{codes['entropy']:.3f} bits of {math.log2(manifest.codebook_size):.3f}",
            "perplexity": f"{codes['perplexity']:.1f}",
            "samples with all codes in common": f"{duplicates['samples']} in {duplicates['groups']} groups",
        },
    )
    for name in ("largest", "smallest"):
        _print_table(f"\n{name} classes", {c["class"]: c["samples"] for c in classes[name]})
    for name in ("most_used", "least_used"):
        _print_table(f"\n{name.replace('_', ' ')} codes", {c["code"]: f"{100 * c['share']:.4f} %" for c in codes[name]})
    if duplicates["first"]:
        _print_table(
            "\nfirst duplicates (sample ids)", {i: ", ".join(map(str, g)) for i, g in enumerate(duplicates["first"])}
        )
    if a.sheet:
        print(f"\n{a.sheet}")
    return 0


def summary(m: Manifest, s: Stats, top: int) -> dict[str, Any]:
    """Figures of ``stats``; ``top`` entries at either end of the classes and the codes."""
    import numpy as np

    by_class, by_code = np.argsort(-s.classes, kind="stable"), np.argsort(-s.codes, kind="stable")
    total = int(s.codes.sum())

    def classes(some: np.ndarray) -> list[dict[str, Any]]:
        return [{"class": f"{c} {m.classes[c]}", "samples": int(s.classes[c])} for c in some.tolist()]

    def codes(some: np.ndarray) -> list[dict[str, Any]]:
        return [{"code": c, "share": int(s.codes[c]) / total} for c in some.tolist()]

    return {
        "samples": m.samples,
        "classes": {
            "used": int((s.classes > 0).sum()),
            "min": int(s.classes.min()),
            "median": float(np.median(s.classes)),
            "max": int(s.classes.max()),
            "largest": classes(by_class[:top]),
            "smallest": classes(by_class[::-1][:top]),
        },
        "codes": {
            "used": int((s.codes > 0).sum()),
            "usage": s.usage,
            "entropy": s.entropy,
            "perplexity": s.perplexity,
            "most_used": codes(by_code[:top]),
            "least_used": codes(by_code[::-1][:top]),
        },
        "duplicates": {
            "groups": len(s.duplicates),
            "samples": sum(map(len, s.duplicates)),
            "first": s.duplicates[:top],
        },
    }


def check_tokenizer(m: Manifest, tokenizer: str, where: str) -> None:
    """Raises ``UserError`` unless it is the one that made the codes."""
    from megastar.tokenizer.io import read_tokenizer_metadata, tokenizer_hash

    config, _ = read_tokenizer_metadata(tokenizer)
    digest = tokenizer_hash(tokenizer)
    if m.tokenizer_sha256 and digest != m.tokenizer_sha256:
        raise UserError(
            f"the codes of {where} were made with another tokenizer (SHA-256 {m.tokenizer_sha256[:12]}..., {tokenizer} has {digest[:12]}...): name that one"
        )
    if (config.codebook_size, config.grid) != (m.codebook_size, m.grid):
        raise UserError(
            f"{tokenizer} has {config.codebook_size} codes on a grid of {config.grid}, {where} has {m.codebook_size} on {m.grid}: name the tokenizer that made them"
        )


def draw_sheet(a: argparse.Namespace, m: Manifest, labels: np.ndarray) -> None:
    """The first pictures of some classes, decoded from their centre crop."""
    from contextlib import closing

    import numpy as np
    import torch

    from megastar.data.shards.reader import ShardSet
    from megastar.sampling.grid import Block, image_grid, save_grid
    from megastar.sampling.sampler import decode_images
    from megastar.tokenizer.io import load_tokenizer

    used = np.unique(labels)
    shown = used[np.unique(np.linspace(0, len(used) - 1, min(a.rows, len(used))).round().astype(int))]
    ids = np.concatenate([np.flatnonzero(labels == c)[: a.per_class] for c in shown])
    with closing(ShardSet(a.set, data=_config(a), max_open=1)) as shards:
        codes, _ = shards.gather(ids, np.full((len(ids), 1), m.centre_view))
    pictures = decode_images(load_tokenizer(a.tokenizer), torch.from_numpy(codes[:, 0].astype(np.int64)))
    sheet = image_grid([Block("", pictures, labels[ids].tolist())], m.classes, columns=a.per_class)
    save_grid(sheet, a.sheet, {"shards": a.set, "tokenizer_sha256": m.tokenizer_sha256, "view": m.centre_view})


# index -------------------------------------------------------------------------------------------------------------
def index(a: argparse.Namespace, console: Console) -> int:
    classes = None
    if a.classes is not None:
        if not Path(a.classes).is_file():
            raise UserError(f"--classes {a.classes} does not exist: name a file with a class name a line")
        classes = Path(a.classes).read_text(encoding="utf-8").split("\n")
        classes = [line.strip() for line in classes[: -1 if not classes[-1] else None]]
    from megastar.data.shards.import_webdataset import index_foreign

    manifest = index_foreign(
        a.set, tokenizer=a.tokenizer, codebook_size=a.codebook_size, classes=classes, layout=a.layout, crops=a.crops,
        data=_config(a), console=console,
    )  # fmt: skip
    _print_table(a.set, {k: v for k, v in describe(manifest).items() if k not in ("class_names", "made_by", "skipped")})
    return 0
