"""Requests to S3 of the ranks of one node, counted by a client that takes the place of boto3's."""

from __future__ import annotations

import argparse
import hashlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PER_NODE, WINDOW, SHARD = 8, 16, 1000  # pretokenize's and the configuration's defaults


class CountingClient:
    """Stands for boto3's client: serves a set of shards that differ in one code, and counts requests."""

    def __init__(self, folder: Path, shards: int):
        import numpy as np

        from megastar.data.shards.manifest import Manifest, write_manifest
        from megastar.data.shards.reader import ShardSet
        from megastar.data.shards.writer import open_writer
        from megastar.data.storage.store import FolderStore

        self.count: Counter[str] = Counter()
        self.objects: dict[str, Any] = {}
        folder.mkdir()
        with open_writer(folder / "shard-00000.tar", "packed") as writer:
            for i in range(SHARD):
                writer.add(f"{i}", np.zeros((2, 16), np.uint16), 0, f"{i}")
        info = writer.info()
        classes, codes = (
            ["a"],
            {"grid": 4, "tokens": 16, "views": 2, "codebook_size": 4096, "crops": "none", "image_size": 64},
        )
        one = Manifest(samples=SHARD, classes=classes, tokenizer_sha256="", shards=[info], layout="packed", **codes)
        write_manifest(FolderStore(folder), one)
        with closing(ShardSet(folder)) as found:
            place = int(found.index(0).offsets[0])
        base, infos = (folder / info.name).read_bytes(), []
        for number in range(shards):
            content = base[:place] + (number % 4096).to_bytes(2, "little") + base[place + 2 :]
            infos.append(replace(info, name=f"shard-{number:05d}.tar", sha256=hashlib.sha256(content).hexdigest()))
            self.objects[f"set/{infos[-1].name}"] = content
        manifest = replace(one, samples=SHARD * shards, shards=infos)
        self.objects["set/manifest.json"] = manifest.to_json().encode()

    def get_object(self, Bucket: str, Key: str, Range: str = "", IfMatch: str = "") -> dict[str, Any]:
        from botocore.exceptions import ClientError

        kind = "manifest" if Key.endswith(".json") else "index" if Key.endswith(".idx") else "shard"
        self.count[kind] += 1
        if Key not in self.objects:
            raise ClientError(
                {"Error": {"Code": "NoSuchKey"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "GetObject"
            )
        content = self.objects[Key]
        first, _, last = Range.removeprefix("bytes=").partition("-")
        part = content[int(first or 0) : int(last or len(content)) + 1]
        span = f"bytes {first or 0}-{int(first or 0) + len(part) - 1}/{len(content)}"
        return {"Body": io.BytesIO(part), "ETag": '"1"', "ContentRange": span, "ContentLength": len(part)}


def measure_s3(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One node of ``PER_NODE`` ranks: requests until each has its first batch, and for each step after that."""
    from megastar.config.schema import DataConfig
    from megastar.data.storage import s3_client
    from tests.loaders import make_loader

    init = s3_client.S3Folder.__init__
    for world in a.ranks:
        batch, row = world * -(-256 // world), {"ranks": world}
        steps = max(4, 2 * SHARD // batch)
        with tempfile.TemporaryDirectory() as name:
            client = CountingClient(Path(name) / "set", 4 * WINDOW + -(-batch * (2 * steps + 10) // SHARD))

            def patched(self: Any, url: str, patience: float = 60.0, report: Any = print, client: Any = client) -> None:
                self.url, self.patience, self.report = url, patience, report
                self.bucket, self.prefix = s3_client.split_url(url)
                self.aws, self.signed, self.endpoint = SimpleNamespace(client=client, generation=0), False, "none"

            s3_client.S3Folder.__init__ = patched
            for cached in (True, False):
                client.count.clear()
                loaders = []
                for rank in range(PER_NODE):
                    cache = f"{name}/cache-{0 if cached else rank}"
                    data = DataConfig(cache=cache, cache_gib=1.0)
                    options = {
                        "class_dropout_prob": 0.0,
                        "num_classes": 1,
                        "vocab_size": 4096,
                        "tokens": 16,
                        "views": 1,
                    }
                    place = {"rank": rank, "world": world, "prefetch": 2}
                    loaders.append(
                        make_loader(
                            "s3://b/set", seed=0, global_batch=batch, window=WINDOW, data=data, **options, **place
                        )
                    )
                readers = [iter(loader) for loader in loaders]
                for reader in readers:
                    next(reader)
                start, marks = settled(client, a.pause), []
                for step in range(2 * steps):
                    for reader in readers:
                        next(reader)
                    if step + 1 in (steps, 2 * steps):
                        marks.append(settled(client, a.pause))
                for reader, loader in zip(readers, loaders, strict=True):
                    reader.close()
                    loader.close()
                each, nodes = (marks[1] - marks[0]) / steps, max(1, world // PER_NODE)
                what = "with a node cache" if cached else "a cache a rank"
                row |= {f"start, {what}": start * nodes, f"GET/s, {what}": each * nodes / a.step_seconds}
        yield row
    s3_client.S3Folder.__init__ = init


def settled(client: CountingClient, pause: float) -> int:
    """Requests so far, once reading ahead is done."""
    before = -1
    while (now := sum(client.count.values())) != before:
        before = now
        time.sleep(pause)
    return now
