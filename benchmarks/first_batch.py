"""Time to the first batch from S3, and memory of a rank. The server is SeaweedFS on the loopback interface.

    python benchmarks/first_batch.py                              20 shards of 16 MB
    python benchmarks/first_batch.py --megabytes 100 --repeats 5

The first batch is timed from an empty cache, including the creation of client and loader. The reference is plain boto3,
which downloads one shard of the same set in reads of 1 MiB and discards it. Memory is the peak of a separate process that
reads batches, minus its memory after its imports. RssAnon is private memory; Rss includes the pages of mapped shards,
which the kernel can reclaim; Pss divides these pages among the processes that map them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import seconds
from s3 import T, V, serve, upload, write_shards


def memory() -> dict[str, int]:
    """Memory of this process in bytes: RssAnon, Rss, Pss."""
    found = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) << 10
    return {"RssAnon": found["Anonymous"], "Rss": found["Rss"], "Pss": found["Pss"]}


def loader_of(url: str, cache: str, batch: int, window: int):
    from megastar.config.schema import DataConfig
    from tests.loaders import make_loader

    options = {"views": 2, "class_dropout_prob": 0.1, "num_classes": 1000, "vocab_size": V, "tokens": T}
    return make_loader(
        url, seed=0, global_batch=batch, window=window, data=DataConfig(cache=cache, cache_gib=1000), **options
    )


def rank(url: str, cache: str, batch: int, window: int, steps: int) -> None:
    """Read batches in this process and print its peak memory minus that after its imports."""
    import boto3  # noqa: F401
    import numpy  # noqa: F401
    import torch  # noqa: F401

    from megastar.data import loader  # noqa: F401

    base, peak, done = memory(), dict.fromkeys(("RssAnon", "Rss", "Pss"), 0), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for name, value in memory().items():
                peak[name] = max(peak[name], value - base[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    source = loader_of(url, cache, batch, window)
    for _, _ in zip(range(steps), source, strict=False):
        pass
    source.close()
    done.set()
    watcher.join()
    print(json.dumps(peak))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shards", type=int, default=20)
    p.add_argument("--megabytes", type=float, default=16, help="of one shard")
    p.add_argument("--window", type=int, default=16)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument(
        "--folder", type=Path, default=None, help="scratch folder, removed at the end (default: a temporary one)"
    )
    p.add_argument("--rank", nargs=5, default=None, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.rank:
        rank(a.rank[0], a.rank[1], *map(int, a.rank[2:]))
        return
    root = a.folder or Path(tempfile.mkdtemp(prefix="megastar-first-batch-"))
    server = None
    try:
        write_shards(root / "set", a.shards, a.megabytes)
        server = serve(root)
        measure(a, root, server.endpoint)
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(root, ignore_errors=True)


def measure(a: argparse.Namespace, root: Path, endpoint: str) -> None:
    from megastar.data.shards.manifest import load_manifest
    from tests.integration.helpers.s3 import client_of

    client, manifest = client_of(endpoint), load_manifest(root / "set")
    upload(client, root / "set", "codes", "set")
    name, cache = manifest.shards[0].name, str(root / "cache")

    def download() -> None:
        body = client.get_object(Bucket="codes", Key=f"set/{name}")["Body"]
        while body.read(1 << 20):
            pass

    def first() -> float:
        """Seconds to the first batch, without the clean-up."""
        shutil.rmtree(cache, ignore_errors=True)
        start = time.perf_counter()
        source = loader_of("s3://codes/set", cache, a.batch, a.window)
        next(batches := iter(source))
        took = time.perf_counter() - start
        batches.close()
        source.close()
        return took

    rows: dict[str, list[float]] = {"one shard by boto3": [], "first batch, cold": []}
    for _ in range(a.repeats):
        rows["one shard by boto3"] += seconds(download, 1)
        rows["first batch, cold"].append(first())
    print(f"{a.shards} shards of {manifest.shards[0].bytes / 1e6:.0f} MB, window {a.window}, batch {a.batch}")
    for what, times in rows.items():
        print(f"  {what:<24} {statistics.median(times):7.3f} s  ({min(times):.3f} to {max(times):.3f})")
    over = statistics.median(b - o for o, b in zip(*rows.values(), strict=True))
    print(f"  first batch - one shard  {over:7.3f} s  (goal: at most 1 s; includes the creation of the loader)")

    steps = max(1, manifest.samples // a.batch)  # an epoch
    print(f"memory of a rank minus that of its imports, {steps} batches (goal: at most 200 MB)")
    for what, url in (("folder", str(root / "set")), ("S3, empty cache", "s3://codes/set")):
        shutil.rmtree(cache, ignore_errors=True)
        words = ["--rank", url, cache, str(a.batch), str(a.window), str(steps)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(
            [sys.executable, __file__, *words], env=environment, capture_output=True, text=True, check=True
        )
        peaks = json.loads(done.stdout.splitlines()[-1])
        print(f"  {what:<24} " + "   ".join(f"{n} {v / 1e6:6.0f} MB" for n, v in peaks.items()))


if __name__ == "__main__":
    main()
