"""``megastar data stats``: classes, codes, duplicates and a sheet of images of token shards."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import print_table
from megastar.commands._shared.outputs import check_outputs
from megastar.errors import UserError
from megastar.utils.printable import say

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from megastar.config.schema import DataConfig
    from megastar.data.shards.manifest import Manifest
    from megastar.data.shards.stats import Stats


def stats(a: argparse.Namespace, data: DataConfig, console: Console) -> int:
    from megastar.checkpoint.hub.download import local_tokenizer
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.shards.stats import count

    if bool(a.sheet) != bool(a.tokenizer):
        raise UserError("--sheet and --tokenizer must be given together: the tokenizer decodes the codes into images")
    check_outputs({"--sheet": a.sheet}, a.tokenizer)
    manifest = load_manifest(a.set, data)
    if a.tokenizer:
        a.tokenizer = local_tokenizer(a.tokenizer)
        check_tokenizer(manifest, a.tokenizer, a.set)
    counts = count(a.set, data, console)
    if a.sheet:
        draw_sheet(a, data, manifest, counts.labels)
    report = summary(manifest, counts, a.top)
    if a.json:
        report |= {"set": a.set}
        report |= {"samples_of_each_class": counts.classes.tolist(), "uses_of_each_code": counts.codes.tolist()}
        print(json.dumps(report, indent=1))
        return 0
    codes, classes, duplicates = report["codes"], report["classes"], report["duplicates"]
    print_table(
        a.set,
        {
            "samples": report["samples"],
            "classes": f"{classes['used']} of {len(manifest.classes)} used",
            "samples per class": "min {min}, median {median:g}, max {max}".format(**classes),
            "codes": f"{codes['used']} of {manifest.codebook_size} used ({100 * codes['usage']:.1f} %)",
            "entropy": f"{codes['entropy']:.3f} bits of {math.log2(manifest.codebook_size):.3f}",
            "perplexity": f"{codes['perplexity']:.1f}",
            "samples with identical codes": f"{duplicates['samples']} in {duplicates['groups']} groups",
        },
    )
    for name in ("largest", "smallest"):
        print_table(f"\n{name} classes", {str(c["class"]): c["samples"] for c in classes[name]})
    for name in ("most_used", "least_used"):
        print_table(
            f"\n{name.replace('_', ' ')} codes", {str(c["code"]): f"{100 * c['share']:.4f} %" for c in codes[name]}
        )
    if duplicates["first"]:
        groups = {str(i): ", ".join(map(str, g)) for i, g in enumerate(duplicates["first"])}
        print_table("\nfirst duplicates (sample ids)", groups)
    if a.sheet:
        say(f"\n{a.sheet}")
    return 0


def summary(m: Manifest, s: Stats, top: int) -> dict[str, Any]:
    """The JSON content of ``stats``, with the ``top`` largest and smallest classes and codes."""
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
    """Raise ``UserError`` unless ``tokenizer`` encoded the shards."""
    from megastar.tokenizer.io import read_tokenizer_metadata, tokenizer_hash

    config, _ = read_tokenizer_metadata(tokenizer)
    digest = tokenizer_hash(tokenizer)
    if m.tokenizer_sha256 and digest != m.tokenizer_sha256:
        raise UserError(
            f"the codes of {where} come from another tokenizer (SHA-256 {m.tokenizer_sha256[:12]}..., {tokenizer} has "
            f"{digest[:12]}...): give that tokenizer"
        )
    if (config.codebook_size, config.grid) != (m.codebook_size, m.grid):
        raise UserError(
            f"{tokenizer} has {config.codebook_size} codes on a {config.grid} x {config.grid} grid, {where} has "
            f"{m.codebook_size} on {m.grid} x {m.grid}: give the tokenizer that encoded them"
        )


def draw_sheet(a: argparse.Namespace, data: DataConfig, m: Manifest, labels: np.ndarray) -> None:
    """Write the first images of some classes, decoded from their centre crop."""
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
    with closing(ShardSet(a.set, data=data, max_open=1)) as shards:
        codes, _ = shards.gather(ids, np.full((len(ids), 1), m.centre_view))
    images = decode_images(load_tokenizer(a.tokenizer), torch.from_numpy(codes[:, 0].astype(np.int64)))
    sheet = image_grid([Block("", images, labels[ids].tolist())], m.classes, columns=a.per_class)
    save_grid(sheet, a.sheet, {"shards": a.set, "tokenizer_sha256": m.tokenizer_sha256, "view": m.centre_view})
