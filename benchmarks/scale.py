"""What breaks first at scale, by simulation on one machine: 8 to 16,384 ranks, 1.28 million to 10 billion samples.

    python benchmarks/scale.py              minutes
    python benchmarks/scale.py --tiny       seconds, small numbers; a test runs it
    python benchmarks/scale.py --only store --ranks 64,256,1024

Parts: ``data`` writes and reads manifests and draws a rank's rows, at the start and in the middle of an epoch; ``s3`` runs
the ranks of one node on a store that counts requests; ``store`` connects clients to a TCPStore and sends heartbeats at the
rate of a run; ``checkpoint`` writes, publishes, reads and removes checkpoints of as many files, and counts operations on
files. Seconds are of processor time unless the column has "wall". Numbers of ranks beyond ``--most`` connections or files
are extrapolated from the largest measured one, and marked with "~".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from simulation.checkpoint_files import measure_checkpoint
from simulation.measure import in_process, private_mib, spent
from simulation.s3_requests import SHARD, WINDOW, measure_s3

RANKS = (8, 64, 512, 1024, 4096, 16384)
SAMPLES = (1_281_167, 100_000_000, 1_000_000_000, 10_000_000_000)
BEAT = b"." + b"x" * 250  # as long as a heartbeat


def table(title: str, rows: Iterable[dict[str, Any]], quiet: bool) -> list[dict[str, Any]]:
    """Print each row of a Markdown table when it is measured; returns the rows."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        if not quiet and len(found) == 1:
            print(f"\n{title}\n\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        if not quiet:
            print("| " + " | ".join(map(shown, row.values())) + " |", flush=True)
    return found


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# Data ----------------------------------------------------------------------------------------------------------------
def data_row(samples: int, shard: int, folder: str, queue: Any) -> None:
    """In a process of its own: memory is measured."""
    from megastar.data.order import OrderSpec, sample_ids
    from megastar.data.shards.manifest import Manifest, load_manifest, write_manifest
    from megastar.data.shards.shard_table import TABLE_ABOVE
    from megastar.data.storage.shard_info import ShardInfo
    from megastar.data.storage.store import FolderStore

    class Shards(Sequence[ShardInfo]):  # a list of ten million would take gigabytes
        def __len__(self) -> int:
            return -(-samples // shard)

        def __getitem__(self, i: Any) -> Any:
            if i >= len(self):
                raise IndexError
            digest = hashlib.sha256(i.to_bytes(8, "big")).hexdigest()
            return ShardInfo(f"shard-{i:05d}.tar", min(shard, samples - i * shard), 5800 * shard, digest)

    shards = Shards() if len(Shards()) > TABLE_ABOVE else list(Shards())
    fields = {"grid": 16, "tokens": 256, "views": 10, "codebook_size": 16384, "crops": "ten:1.1", "image_size": 256}
    classes = [f"class {i}" for i in range(1000)]
    manifest = Manifest(samples=samples, classes=classes, tokenizer_sha256="0" * 64, shards=shards, **fields)
    write_manifest(FolderStore(folder), manifest)
    count, size = len(shards), sum(f.stat().st_size for f in Path(folder).iterdir())
    del shards, manifest
    before = private_mib()
    parse, manifest = spent(lambda: load_manifest(folder))
    spec = OrderSpec(0, manifest.shard_sizes, WINDOW)
    first, _ = spent(lambda: sample_ids(spec, 0, 16))
    following, _ = spent(lambda: sample_ids(spec, 4096, 16))
    fresh = OrderSpec(0, manifest.shard_sizes, WINDOW)
    middle, _ = spent(lambda: sample_ids(fresh, 7 * samples + samples // 2, 16))
    queue.put(
        {
            "samples": samples,
            "shard": shard,
            "shards": count,
            "manifest MB": size / 1e6,
            "parse s": parse,
            "first rows s": first,
            "next rows s": following,
            "rows in the middle of an epoch s": middle,
            "MiB a rank": private_mib() - before,
        }
    )


def measure_data(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for samples in a.samples:
        for shard in a.shards:
            with tempfile.TemporaryDirectory() as folder:
                yield in_process(data_row, samples, shard, folder)


# The store of the ranks ----------------------------------------------------------------------------------------------
def clients(port: int, first: int, count: int, seconds: float, ready: Any, go: Any, queue: Any) -> None:
    """``count`` connections as of ranks ``first`` and up: each publishes and reads one heartbeat a second."""
    import torch.distributed as dist

    def join(rank: int) -> tuple[float, Any]:
        start = time.perf_counter()
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        took = time.perf_counter() - start
        store.set(f"beat/{rank}", BEAT)
        return took, store

    with ThreadPoolExecutor(8) as pool:
        joined = list(pool.map(join, range(first, first + count)))
    queue.put([took for took, _ in joined])
    ready.release()
    go.wait()
    begin = time.monotonic()
    for n in range(int(seconds * count)):
        time.sleep(max(0.0, begin + n / count - time.monotonic()))
        store = joined[n % count][1]
        store.set(f"beat/{first + n % count}", BEAT)
        store.multi_get(["beat/0"])


def store_row(ranks: int, seconds: float, queue: Any) -> None:
    """In a process of its own, which hosts the store as rank 0 does."""
    import torch.distributed as dist

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("beat/0", BEAT)
    spawn, processes = multiprocessing.get_context("spawn"), 2
    ready, go, results = spawn.Semaphore(0), spawn.Event(), spawn.Queue()
    part = max(1, ranks // processes)
    used = time.process_time()
    children = [
        spawn.Process(target=clients, args=(store.port, 1 + i * part, part, seconds + 1, ready, go, results))
        for i in range(processes)
    ]
    for child in children:
        child.start()
    joins = [took for _ in children for took in results.get()]
    for _ in children:
        ready.acquire()
    used = time.process_time() - used
    keys = [f"beat/{i}" for i in range(1, 1 + part * processes)]
    go.set()
    time.sleep(0.5)
    before, begin = time.process_time(), time.monotonic()
    while time.monotonic() - begin < seconds:
        store.multi_get(keys)
        time.sleep(1.0)
    share = (time.process_time() - before) / (time.monotonic() - begin)
    for child in children:
        child.join()
    store.set("digest", BEAT * 2)
    every, _ = spent(lambda: [store.multi_get(keys) for _ in range(5)])  # of client and server, in this process
    digest, _ = spent(
        lambda: [(store.multi_get(["beat/0"]), store.check(["digest"]), store.get("digest")) for _ in range(50)]
    )
    queue.put(
        {
            "ranks": len(keys),
            "join, median ms wall": 1e3 * statistics.median(joins),
            "join of all s": used,
            "share of a core, heartbeats": share,
            "all read all s": every / 5 * len(keys),
            "all read the digest s": digest / 50 * len(keys),
        }
    )


def measure_store(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # a name server that does not answer delays each join
    powers = {"join, median ms wall": 0, "all read all s": 2}
    last: dict[str, Any] = {}
    for ranks in a.ranks:
        if ranks <= a.most:
            last = in_process(store_row, ranks, a.seconds)
            yield last
        else:
            factor = ranks / last["ranks"]
            yield {k: f"~{ranks:,}" if k == "ranks" else v * factor ** powers.get(k, 1) for k, v in last.items()}


PARTS = {
    "data": (measure_data, "Data of one rank"),
    "s3": (
        measure_s3,
        "Requests to S3 of all nodes, shards of 1,000 samples, one batch of max(256, ranks) images a step",
    ),
    "store": (measure_store, "Rank 0's store"),
    "checkpoint": (measure_checkpoint, "Checkpoints: one file a rank, one a data rank, and operations on files"),
}


def numbers(text: str) -> list[int]:
    return [int(float(word)) for word in text.split(",")]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="8 and 16 ranks, 10,000 samples, short measurements")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--ranks", type=numbers, default=list(RANKS))
    p.add_argument("--samples", type=numbers, default=list(SAMPLES))
    p.add_argument("--shards", type=numbers, default=[SHARD, 8192], help="samples of a shard")
    p.add_argument("--most", type=int, default=1024, help="connections to the store")
    p.add_argument("--most-files", type=int, default=4096, help="ranks whose checkpoint files are written")
    p.add_argument("--seconds", type=float, default=10.0, help="of heartbeats")
    p.add_argument("--step-seconds", type=float, default=1.0, help="of a training step, for requests a second")
    p.add_argument("--pause", type=float, default=0.4, help="seconds without a request that count as settled")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    a = p.parse_args()
    if a.tiny:
        a.ranks, a.samples, a.shards, a.most, a.seconds, a.pause = [8, 16], [10_000], [100], 8, 1.0, 0.1
    found = {}
    for name in a.only:
        measure, title = PARTS[name]
        found[name] = table(title, measure(a), a.json)
    if a.json:
        print(json.dumps(found))
    else:
        print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
