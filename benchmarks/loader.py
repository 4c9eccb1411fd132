"""Samples per second of one process reading local shards, compared with webdataset and LlamaGen's loader.

    LLAMAGEN_DIR=~/LlamaGen python benchmarks/loader.py
    python benchmarks/loader.py --samples 5000 --only plain,packed,webdataset

Codes are random and written to a temporary folder; the page cache is warm. Repetitions are interleaved; values are
medians.

megastar: batches of `TokenLoader`, two of the ten stored views, int64 tensors, iterated as in the training loop.
webdataset: its fastest documented pipeline for arrays, `WebDataset(select_files=...).shuffle().to_tuple()
.map_tuple(np.frombuffer ...).batched()`, without autodecoding, two views; `WebLoader` is not needed in one process. With
packed shards it decodes a block at a time and splits it with `unbatched`.
LlamaGen: its `CustomDataset` (dataset/imagenet.py, one file per image and one per label, one view) with the DataLoader
of its train_c2i.py, in this process and with workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from common import ROOT  # noqa: F401  (puts the checkout on the path)

VOCAB = 16384


def write_ours(folder: Path, layout: str, a: argparse.Namespace) -> None:
    from megastar.data.shards.manifest import Manifest
    from megastar.data.shards.writer import open_writer
    from megastar.utils.files import write_atomic

    folder.mkdir()
    rng, shards = np.random.default_rng(0), []
    for first in range(0, a.samples, a.shard):
        with open_writer(folder / f"shard-{first // a.shard:05d}.tar", layout) as writer:
            for i in range(first, min(first + a.shard, a.samples)):
                codes = rng.integers(0, VOCAB, (a.views, a.tokens), dtype=np.uint16)
                writer.add(f"{i:09d}", codes, i % 1000, f"n{i % 1000}/{i}.JPEG")
        shards.append(writer.info())
    fields = {"samples": a.samples, "classes": [str(i) for i in range(1000)], "grid": int(a.tokens**0.5)}
    fields |= {"tokens": a.tokens, "views": a.views, "codebook_size": VOCAB, "crops": "ten:1.1", "image_size": 256}
    manifest = Manifest(**fields, tokenizer_sha256="", shards=shards, layout=layout)
    write_atomic(folder / "manifest.json", manifest.to_json().encode())


def write_llamagen(folder: Path, a: argparse.Namespace) -> None:
    """Write codes and labels as LlamaGen's extract_codes_c2i.py does: int64 (1, views, T) and (1,)."""
    rng = np.random.default_rng(0)
    for name in ("codes", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(a.samples):
        np.save(folder / f"codes/{i}.npy", rng.integers(0, VOCAB, (1, a.views, a.tokens)))
        np.save(folder / f"labels/{i}.npy", np.array([i % 1000]))


def rate(batches: Iterator, count: Callable[[object], int], seconds: float) -> float:
    """Samples/s over about ``seconds``, excluding the first batch."""
    next(batches)
    seen, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in islice(batches, 4):
            seen += count(batch)
    return seen / (time.perf_counter() - start)


def ours(folder: Path, a: argparse.Namespace) -> float:
    from tests.loaders import make_loader

    loader = make_loader(
        folder, seed=0, global_batch=a.batch, views=a.used, class_dropout_prob=0.1, num_classes=1000,
        vocab_size=VOCAB, tokens=a.tokens, window=a.window,
    )  # fmt: skip
    batches = iter(loader)
    try:
        return rate(batches, lambda b: len(b["codes"]), a.seconds)
    finally:
        loader.close()


def webdataset(folder: Path, a: argparse.Namespace) -> float:
    import webdataset as wds

    urls = sorted(str(p) for p in folder.glob("*.tar"))
    header = 128  # bytes of the npy header of such arrays

    def codes(data: bytes) -> np.ndarray:
        stored = np.frombuffer(data, "<u2", offset=header).reshape(a.views, a.tokens)
        return stored[random.sample(range(a.views), a.used)].astype(np.int64)

    def block(sample: dict) -> tuple[np.ndarray, np.ndarray]:
        labels = np.frombuffer(sample["cls.npy"], "<i8", offset=header)
        stored = np.frombuffer(sample["codes.npy"], "<u2", offset=header).reshape(len(labels), a.views, a.tokens)
        views = np.random.rand(len(labels), a.views).argsort(1)[:, : a.used]
        return stored[np.arange(len(labels))[:, None], views].astype(np.int64), labels

    data = wds.WebDataset(
        urls, shardshuffle=len(urls), select_files=lambda name: not name.endswith(".json"), empty_check=False
    ).repeat()
    if json.loads((folder / "manifest.json").read_text())["layout"] == "packed":
        data = data.map(block).unbatched()
    else:
        data = data.to_tuple("codes.npy", "cls").map_tuple(codes, int)
    return rate(iter(data.shuffle(1000).batched(a.batch)), lambda b: len(b[0]), a.seconds)


def llamagen(folder: Path, a: argparse.Namespace, workers: int) -> float:
    import torch

    sys.path.insert(0, os.environ["LLAMAGEN_DIR"])
    if "torchvision" not in sys.modules:  # LlamaGen's module imports it for another data set
        stub = types.ModuleType("torchvision.datasets")
        stub.ImageFolder = None  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": types.ModuleType("torchvision"), "torchvision.datasets": stub}
    from dataset.imagenet import CustomDataset

    dataset = CustomDataset(str(folder / "codes"), str(folder / "labels"))
    dataset.feature_files = dataset.feature_files[: a.samples]  # it lists ImageNet's 1,281,167 files
    dataset.label_files = dataset.label_files[: a.samples]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=a.batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )

    def endless() -> Iterator:
        while True:
            yield from loader

    return rate(endless(), lambda b: len(b[0]), a.seconds)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--samples", type=int, default=20000)
    p.add_argument("--shard", type=int, default=1000, help="samples per shard")
    p.add_argument("--views", type=int, default=10, help="stored views per sample")
    p.add_argument("--used", type=int, default=2, help="views per sample in a batch")
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--window", type=int, default=16)
    p.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--workers", type=int, default=2, help="workers of LlamaGen's DataLoader")
    p.add_argument("--only", default="", help="comma-separated: plain, packed, webdataset, llamagen")
    a = p.parse_args()
    wanted = [w for w in a.only.split(",") if w] or ["plain", "packed", "webdataset", "llamagen"]
    if "llamagen" in wanted and "LLAMAGEN_DIR" not in os.environ:
        print(
            "LLAMAGEN_DIR is not set, LlamaGen is omitted: clone github.com/FoundationVision/LlamaGen and set LLAMAGEN_DIR to the clone"
        )
        wanted.remove("llamagen")

    with tempfile.TemporaryDirectory(prefix="megastar-loader-") as temporary:
        plain, packed, theirs = (Path(temporary) / n for n in ("plain", "packed", "c2i_flip_ten_crop"))
        runs: dict[str, Callable[[], float]] = {}
        if {"plain", "webdataset"} & set(wanted):
            write_ours(plain, "plain", a)
        if {"packed", "webdataset"} & set(wanted):
            write_ours(packed, "packed", a)
        if "plain" in wanted:
            runs["megastar, plain"] = lambda: ours(plain, a)
        if "packed" in wanted:
            runs["megastar, packed"] = lambda: ours(packed, a)
        if "webdataset" in wanted:
            runs["webdataset, plain"] = lambda: webdataset(plain, a)
            runs["webdataset, packed"] = lambda: webdataset(packed, a)
        if "llamagen" in wanted:
            write_llamagen(theirs, a)
            runs["LlamaGen, in this process"] = lambda: llamagen(theirs, a, 0)
            runs[f"LlamaGen, {a.workers} workers"] = lambda: llamagen(theirs, a, a.workers)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(a.repeats):
            for name, run in runs.items():
                times[name].append(run())
    print(f"{a.used} of {a.views} views of {a.tokens} codes, batches of {a.batch}, {a.samples} samples")
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        print(f"  {name:<28} {medians[name]:>10,.0f} samples/s  ({min(found):,.0f} to {max(found):,.0f})")
    for mine in (n for n in medians if n.startswith("megastar")):
        for other in (n for n in medians if not n.startswith("megastar")):
            print(f"  {mine} / {other} = {medians[mine] / medians[other]:.1f}")


if __name__ == "__main__":
    main()
