"""The node's cache of shards, with a real S3 server (SeaweedFS): bound, left-overs, a full disk, killed processes."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megastar.config.schema import DataConfig
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.storage.shard_cache import ShardCache
from megastar.errors import UserError
from megastar.utils.files import sha256
from tests.disks import with_disks
from tests.integration.conftest import ROOT
from tests.integration.storage import test_store
from tests.integration.storage.test_store import SIZES, cached
from tests.unit.data.shards.test_shards import sample
from tests.unit.data.test_loader import loader

pytestmark = pytest.mark.dist
small_and_quick, folder, url, data = test_store.small_and_quick, test_store.folder, test_store.url, test_store.data


def test_the_bound_holds_and_what_is_mapped_stays(s3, use_s3, url, folder, data):
    use_s3(s3)
    infos = load_manifest(folder).shards
    data.cache_gib = (infos[0].bytes + infos[2].bytes) / 2**30
    first, second = ShardSet(url, data=data), ShardSet(url, data=data, max_open=1)
    view = first.read(0, 7)[0]
    for shard in (1, 2, 3, 1, 2):
        second.read(shard, 0)
        assert f"{infos[0].sha256}.tar" in cached(data) and f"{infos[shard].sha256}.tar" in cached(data)
        assert sum((Path(data.cache) / name).stat().st_size for name in cached(data)) <= data.cache_gib * 2**30
    np.testing.assert_array_equal(view, sample(7)[0])
    first.close()
    second.read(3, 0)
    assert f"{infos[0].sha256}.tar" in cached(data)  # the array still looks into it
    del view
    second.read(1, 0)
    second.read(2, 0)
    assert f"{infos[0].sha256}.tar" not in cached(data)
    with pytest.raises(UserError, match=r"data.cache_gib = .* is less than the .* GiB of the shards that are mixed"):
        loader(url, window=3, data=data)


HOLDER = """
import sys, time
from megastar.data.storage.shard_cache import ShardCache
from megastar.utils.files import sha256
from megastar.data.shards.manifest import load_manifest
from megastar.data.storage.s3_client import S3Folder
cache, info = ShardCache(sys.argv[1], 1 << 30), load_manifest(sys.argv[2]).shards[int(sys.argv[3])]
part = cache.claim(info)
cache.reserve(part, info, True)
print("claimed", flush=True)
time.sleep(60)
"""


def test_the_left_overs_of_a_killed_process_are_swept(s3, use_s3, url, folder, data):
    use_s3(s3)
    words = [sys.executable, "-c", HOLDER, data.cache, str(folder)]
    killed, alive = (subprocess.Popen([*words, n], cwd=ROOT, stdout=subprocess.PIPE, text=True) for n in "01")
    try:
        assert all(p.stdout.readline() == "claimed\n" for p in (killed, alive))
        infos = load_manifest(folder).shards
        assert cached(data) == sorted(f"{i.sha256}.part" for i in infos[:2])
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert ShardCache(data.cache, 1 << 30).claim(infos[1]) is None  # a live one is left alone
        assert cached(data) == [f"{infos[1].sha256}.part"]
        assert ShardSet(url, data=data).read(0, 0)[2] == 0
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()
    assert ShardSet(url, data=data).read(1, 0)[2] == SIZES[0]


def test_a_cache_that_cannot_hold_a_shard(s3, use_s3, url, data):
    use_s3(s3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a full disk that needs no disk
    try:
        with pytest.raises(
            UserError, match=r"shard-00000.tar \(\d+ bytes\) cannot be written to the cache .*: free some space"
        ):
            ShardSet(url, data=data).read(0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached(data) == []
    assert ShardSet(url, data=data).read(0, 0)[2] == 0
    data.cache = "/proc/sys/megastar"  # nobody can write there
    with pytest.raises(
        UserError, match=r"data.cache = /proc/sys/megastar cannot be used .*: set it to a folder on a disk"
    ):
        ShardSet(url, data=data).read(0, 0)


def test_a_disk_that_others_fill_stops_no_reading(s3, use_s3, url, folder, tmp_path):
    use_s3(s3)
    sizes = [info.bytes for info in load_manifest(folder).shards]
    words = ["-m", "tests.integration.helpers.cache_worker", url, folder, tmp_path / "disk"]
    with_disks({tmp_path / "disk": f"{(sizes[0] + sizes[1] + 100_000) // 1024}k"}, *words)


def read_at_random(url: str, data: DataConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    while True:
        shards = ShardSet(url, data=data, max_open=1)
        for _ in range(20):
            shard = int(rng.integers(4))
            row = int(rng.integers(SIZES[shard]))
            i = sum(SIZES[:shard]) + row
            codes, label, found = shards.read(shard, row)
            if found != i or label != sample(i)[1] or not np.array_equal(codes, sample(i)[0]):
                os._exit(3)
        shards.close()


def test_four_processes_killed_at_random_leave_a_good_cache(s3, use_s3, url, folder, data):
    use_s3(s3)
    infos = load_manifest(folder).shards
    data.cache_gib = (infos[0].bytes + infos[2].bytes + 10_000) / 2**30  # always one too few: shards come and go
    fork, rng, seeds = multiprocessing.get_context("fork"), np.random.default_rng(0), itertools.count()

    def start() -> multiprocessing.Process:
        process = fork.Process(target=read_at_random, args=(url, data, next(seeds)), daemon=True)
        process.start()
        return process

    readers = [start() for _ in range(4)]
    try:
        time.sleep(1.0)
        for _ in range(20):
            time.sleep(rng.uniform(0.02, 0.3))
            victim = int(rng.integers(4))
            assert readers[victim].is_alive(), readers[victim].exitcode
            readers[victim].kill()
            readers[victim].join()
            readers[victim] = start()
        time.sleep(0.5)
        assert all(r.is_alive() for r in readers), [r.exitcode for r in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.join()
    for left in Path(data.cache).glob("*.tmp"):  # an index that was being written: swept after a minute
        os.utime(left, (1, 1))
    cache = ShardCache(data.cache, int(data.cache_gib * 2**30))  # sweeps
    assert {Path(n).suffix for n in cached(data)} <= {".tar"}
    for path in cache.folder.glob("*.tar"):
        assert sha256(path) == path.stem
    shards = ShardSet(url, data=data, max_open=1)
    for shard, size in enumerate(SIZES):
        np.testing.assert_array_equal(shards.read(shard, size - 1)[0], sample(sum(SIZES[: shard + 1]) - 1)[0])
    (cache.folder / f"{infos[1].sha256}.tar").unlink(missing_ok=True)  # it is fetched again, and room made
    shards.read(1, 0)
    assert sum(p.stat().st_size for p in cache.folder.glob("*.*")) <= cache.max_bytes


def damage(path: Path) -> None:
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[1000:21000] = bytes(b ^ 0x15 for b in content[1000:21000])
    with path.open("r+b") as f:
        f.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_shard_of_the_cache_is_fetched_again(s3, use_s3, url, folder, data, caplog):
    use_s3(s3)
    infos = load_manifest(folder).shards
    shards = ShardSet(url, data=data)
    for shard in range(4):
        shards.read(shard, 0)
    shards.close()
    del shards
    gc.collect()  # the end of a run
    for info in infos:
        damage(Path(data.cache) / f"{info.sha256}.tar")
    shards = ShardSet(url, data=data)
    shards.store.read_ahead(shards.manifest.shards[2:])
    for shard, size in enumerate(SIZES):
        for row in (0, size - 1):
            np.testing.assert_array_equal(shards.read(shard, row)[0], sample(sum(SIZES[:shard]) + row)[0])
    assert caplog.text.count("is damaged in the cache") == 4 and "fetching it again" in caplog.text
    assert all(sha256(Path(data.cache) / f"{info.sha256}.tar") == info.sha256 for info in infos)
    shards.close()
