"""Speed of reading token shards from S3 (SeaweedFS on the loopback interface), compared with boto3 and webdataset.

    python benchmarks/s3.py                               6 shards of 32 MB, under a minute
    python benchmarks/s3.py --shards 16 --megabytes 100

The first table compares downloads: ``S3Store``, which checks length and SHA-256 and stores the shard in the node's cache;
``get_object`` in reads of 1 MiB, which discards the data; and ``download_file``, which stores them unchecked. The second
table compares batches of codes: ``TokenLoader`` with an empty cache, which mixes --window shards and draws 2 of 10 views;
and webdataset with ``pipe:curl``, which reads in order without sampling. All variants take turns in one process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from contextlib import closing
from pathlib import Path

from common import report, seconds

VIEWS, T, V = 10, 256, 16384


def write_shards(folder: Path, shards: int, megabytes: float) -> None:
    """A set as written by ``megastar pretokenize`` for images of 256 pixels."""
    import numpy as np

    from megastar.data.shards.manifest import Manifest
    from megastar.data.shards.writer import open_writer

    folder.mkdir(parents=True)
    samples, infos, rng = max(1, int(megabytes * 1e6 / 8192)), [], np.random.default_rng(0)
    for number in range(shards):
        codes = rng.integers(0, V, (samples, VIEWS, T), np.uint16)
        with open_writer(folder / f"shard-{number:05d}.tar") as writer:
            for i in range(samples):
                writer.add(f"{number * samples + i:09d}", codes[i], i % 1000, f"{i}")
        infos.append(writer.info())
    manifest = Manifest(
        samples=shards * samples, classes=[str(c) for c in range(1000)], grid=16, tokens=T, views=VIEWS, codebook_size=V,
        crops="ten:1.1", image_size=256, tokenizer_sha256="0" * 64, shards=infos,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())


def serve(root: Path):
    """Start a server with a folder in ``root`` and set this process's AWS variables to it; stop it with ``kill``."""
    from tests.integration.helpers.s3 import KEYS, Server

    (root / "server").mkdir(parents=True)
    server = Server(root / "server")
    server.start()
    try:
        server.make_buckets()
    except BaseException:
        server.kill()
        raise
    os.environ |= {"AWS_ENDPOINT_URL_S3": server.endpoint, "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": KEYS["accessKey"], "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"]}
    return server


def upload(client, folder: Path, bucket: str, prefix: str) -> None:
    """Upload each file in one part and with a content type: unlike S3, the server compresses the parts of a multipart upload
    and decompresses them for every GET."""
    for path in sorted(folder.iterdir()):
        kind = "application/x-tar" if path.suffix == ".tar" else "application/json"
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes(), ContentType=kind)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shards", type=int, default=6)
    p.add_argument("--megabytes", type=float, default=32, help="size of one shard")
    p.add_argument("--window", type=int, default=4)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument(
        "--folder", type=Path, default=None, help="scratch folder, removed at the end (default: a temporary one)"
    )
    a = p.parse_args()
    root = a.folder or Path(tempfile.mkdtemp(prefix="megastar-s3-"))
    server = None
    try:
        write_shards(root / "set", a.shards, a.megabytes)
        server = serve(root)
        compare(a, root, server.endpoint)
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(root, ignore_errors=True)


def compare(a: argparse.Namespace, root: Path, endpoint: str) -> None:
    import webdataset as wds

    from megastar.config.schema import DataConfig
    from megastar.data.shards.manifest import load_manifest
    from megastar.data.storage.s3_store import S3Store
    from tests.integration.helpers.s3 import client_of
    from tests.loaders import make_loader

    client, manifest = client_of(endpoint), load_manifest(root / "set")
    upload(client, root / "set", "public", "set")
    url, data, size = "s3://public/set", DataConfig(cache=str(root / "cache")), sum(s.bytes for s in manifest.shards)

    store = S3Store(url, data)

    def empty() -> None:
        for path in (root / "cache").glob("*.*"):
            path.unlink()

    def plain() -> None:
        for info in manifest.shards:
            body = client.get_object(Bucket="public", Key=f"set/{info.name}")["Body"]
            while body.read(1 << 20):
                pass

    def ours() -> None:
        store.read_ahead(manifest.shards)
        for info in manifest.shards:
            store.open(info).close()
        store.close()

    (root / "boto3").mkdir()

    def to_disk() -> None:
        for info in manifest.shards:
            client.download_file("public", f"set/{info.name}", str(root / "boto3" / info.name))

    def no_files() -> None:
        for path in (root / "boto3").iterdir():
            path.unlink()

    peer = "boto3 get_object, reads of 1 MiB"
    kept = "boto3 download_file"
    rows: dict[str, list[float]] = {peer: [], kept: [], "megastar, checked and in the cache": []}
    for _ in range(a.repeats):
        rows[peer] += seconds(plain, 1)
        rows[kept] += seconds(to_disk, 1, no_files)
        rows["megastar, checked and in the cache"] += seconds(ours, 1, empty)
    report(f"{a.shards} shards, {size / 1e6:.0f} MB from {endpoint}", rows, peer)
    for name, times in rows.items():
        print(f"  {name:<44} {size / statistics.median(times) / 1e6:7.0f} MB/s")
    ratio = statistics.median(rows[kept]) / statistics.median(rows["megastar, checked and in the cache"])
    print(f"  {kept} / megastar = {ratio:.2f}")

    steps = manifest.samples // a.batch

    def loader() -> None:
        options = {"views": 2, "class_dropout_prob": 0.1, "num_classes": 1000, "vocab_size": V, "tokens": T}
        source = make_loader(url, seed=0, global_batch=a.batch, window=a.window, data=data, **options)
        with closing(source):
            for _, _ in zip(range(steps), source, strict=False):
                pass

    def webdataset() -> None:
        urls = [f"pipe:curl -s -f {endpoint}/public/set/{info.name}" for info in manifest.shards]
        pipeline = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("codes.npy", "cls").batched(a.batch)
        for _, _ in zip(range(steps), pipeline, strict=False):
            pass

    peer = "webdataset 1.0.2, pipe:curl"
    rows = {peer: [], "megastar TokenLoader, empty cache": []}
    for _ in range(max(1, a.repeats // 2)):
        rows[peer] += seconds(webdataset, 1)
        rows["megastar TokenLoader, empty cache"] += seconds(loader, 1, empty)
    report(f"batches of {a.batch}: {steps * a.batch} samples of {VIEWS} views", rows, peer)
    for name, times in rows.items():
        print(f"  {name:<44} {steps * a.batch / statistics.median(times):7.0f} samples/s")


if __name__ == "__main__":
    main()
