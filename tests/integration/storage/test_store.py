"""Token shards from a real S3 server (SeaweedFS): the bytes of the folder, through cuts, outages and lies."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megastar import cli
from megastar.config.schema import DataConfig
from megastar.data.loader import validation_batches
from megastar.data.shards import reader
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.verify import _check, verify
from megastar.data.storage import s3_client as s3_module
from megastar.data.storage.errors import StoreUnreachable
from megastar.data.storage.s3_client import S3Folder
from megastar.data.storage.s3_store import S3Store
from megastar.errors import UserError
from tests.integration.conftest import ROOT, megastar
from tests.integration.helpers.s3 import client_of, free_port
from tests.integration.test_train import rows
from tests.unit.data.shards.test_shards import sample, write_set
from tests.unit.data.test_loader import loader, same, take

pytestmark = pytest.mark.dist

SIZES = (60, 50, 70, 40)  # shards of some 150 to 250 kB: several parts of 64 KiB


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the default cache
    monkeypatch.setattr(s3_module, "PART", 1 << 16)
    monkeypatch.setattr(s3_module, "_CHUNK", 1 << 13)
    monkeypatch.setattr(s3_module, "_LONGEST_PAUSE", 0.5)
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)  # for caplog


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("codes") / "train", SIZES)


@pytest.fixture(scope="module")
def url(s3, folder) -> str:
    upload(client_of(s3), folder, "codes", "train")
    return "s3://codes/train"


def upload(client, folder: Path, bucket: str, prefix: str) -> None:
    for path in folder.iterdir():
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "cache"), patience=60)


def cached(data: DataConfig) -> list[str]:
    """But for the indexes, which may be there or not."""
    return sorted(p.name for p in Path(data.cache).iterdir() if p.suffix not in ("", ".idx"))


# The same bytes ----------------------------------------------------------------------------------------------------
def test_everything_reads_as_from_the_folder(s3, use_s3, url, folder, data):
    use_s3(s3)
    assert load_manifest(url, data) == load_manifest(folder)
    here, there = take(loader(folder, window=3), 60), take(loader(url, window=3, data=data), 60)  # two epochs
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    with closing(ShardSet(folder)) as local_set, closing(ShardSet(url, data=data)) as remote_set:
        local, remote = (validation_batches(shards, 150, 16, 1, 2) for shards in (local_set, remote_set))
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert cached(data) == sorted(f"{s.sha256}.tar" for s in load_manifest(folder).shards)
    assert not [t for t in threading.enumerate() if t.name in ("shard-read-ahead", "token-loader")]


def test_a_public_bucket_needs_no_credentials_and_a_closed_one_says_so(s3, use_s3, folder, url, data, monkeypatch):
    upload(client_of(s3), folder, "public", "p")
    use_s3(s3, keys=False)
    assert ShardSet("s3://public/p", data=data).read(1, 3)[2] == SIZES[0] + 3
    with pytest.raises(UserError, match=rf"{s3} denies access to {url}/manifest.json .* no credentials were found"):
        load_manifest(url)
    use_s3(s3)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"denies access to .* \(\w+\): use credentials that may read it"):
        load_manifest(url)


def test_objects_are_listed_read_by_ranges_and_written(s3, use_s3, tmp_path, monkeypatch):
    use_s3(s3)
    client, prefix = client_of(s3), f"listed/{tmp_path.name}"
    folder = S3Folder(f"s3://codes/{prefix}/")
    assert folder.list() == []
    bodies = {f"deep/{i:04d}.bin": bytes([i % 256]) * (i % 7) for i in range(25)}
    monkeypatch.setattr(s3_module, "PAGE", 10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: folder.put(*item), bodies.items()))
    client.put_object(Bucket="codes", Key=f"{prefix}-beside/x", Body=b"not below it")
    assert [(name, size) for name, size, _ in folder.list()] == [(n, len(b)) for n, b in sorted(bodies.items())]
    big = np.random.default_rng(0).bytes(300_000)  # five parts
    folder.put("big", big)
    etag = {name: etag for name, _, etag in folder.list()}["big"]
    assert folder.read("big", 0, 300_000, etag) == big and folder.read("big", 5, 5, etag) == b""
    assert folder.read("big", 1000, 200_001, etag) == big[1000:200_001]
    folder.put("big", big[::-1])
    with pytest.raises(UserError, match=rf"{prefix}/big changed while it was read"):
        folder.read("big", 0, 100, etag)
    with pytest.raises(UserError, match="bucket nowhere of s3://nowhere/x/ does not exist"):
        S3Folder("s3://nowhere/x").list()


def test_an_index_comes_from_the_store_and_is_not_trusted(s3, use_s3, spoilt, data, monkeypatch):
    client, url, prefix, _ = spoilt
    walks = []
    walk = reader.walk_shard
    monkeypatch.setattr(reader, "walk_shard", lambda *a: walks.append(a[1]) or walk(*a))
    client.delete_object(Bucket="codes", Key=f"{prefix}/shard-00001.idx")
    client.put_object(Bucket="codes", Key=f"{prefix}/shard-00002.idx", Body=b"no index")
    client.put_object(Bucket="codes", Key=f"{prefix}/shard-00003.idx", Body=bytes(10_000))  # larger than one may be
    for _ in range(2):
        shards = ShardSet(url, data=data)
        for shard, size in enumerate(SIZES):
            np.testing.assert_array_equal(shards.read(shard, size - 1)[0], sample(sum(SIZES[: shard + 1]) - 1)[0])
    assert walks == [f"{url}/shard-0000{n}.tar" for n in (1, 2, 3)]  # the second time they come from the cache


READER = """
import sys, time
from pathlib import Path
from megastar import cli
from megastar.config.schema import DataConfig
from megastar.data.shards.reader import ShardSet
shards = ShardSet(sys.argv[1], data=DataConfig(cache=sys.argv[2]))
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.01)
print(sum(int(shards.read(s, 0)[0].sum()) for s in range(4)))
"""


def test_two_processes_that_ask_at_once_share_one_download(relay, use_s3, url, folder, data, tmp_path):
    use_s3(relay.endpoint)
    relay.pause = 0.01
    words = [[url, data.cache, str(tmp_path / f"ready{i}"), str(tmp_path / "go")] for i in range(2)]
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, *w], cwd=ROOT, stdout=subprocess.PIPE, text=True) for w in words
    ]
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "go").touch()
    local = ShardSet(folder)
    expected = sum(int(local.read(s, 0)[0].sum()) for s in range(4))
    assert [int(r.communicate(timeout=60)[0]) for r in readers] == [expected, expected]
    for info in local.manifest.shards:
        assert relay.fetched(info.name) == info.bytes


# Cuts and outages --------------------------------------------------------------------------------------------------
def test_a_cut_part_goes_on_where_it_was_cut(relay, use_s3, url, folder, data):
    use_s3(relay.endpoint)
    manifest = load_manifest(url, data)
    relay.cuts, relay.limit, relay.ranges = 6, 30_000, []
    codes, label, _ = ShardSet(url, data=data).read(0, 5)
    assert relay.cuts == 0 and label == sample(5)[1]
    np.testing.assert_array_equal(codes, sample(5)[0])
    asked = relay.fetched(manifest.shards[0].name)
    assert manifest.shards[0].bytes < asked < manifest.shards[0].bytes + 6 * (1 << 16)
    assert [first for _, first, last in relay.ranges if last and first % (1 << 16)]  # not from the part's beginning


def test_a_server_killed_in_the_middle_comes_back_and_the_reader_goes_on(
    weed, relay, use_s3, url, folder, data, caplog, monkeypatch
):
    monkeypatch.setattr("megastar.data.storage.stall_timer.REPORT_EVERY", 0.5)
    use_s3(relay.endpoint)
    shards = ShardSet(url, data=data)
    shards.read(0, 0)

    def outage() -> None:
        weed.kill()
        timer = threading.Timer(1.5, weed.start)
        timer.daemon = True
        timer.start()

    relay.cuts, relay.limit, relay.on_cut = 1, 20_000, outage
    started = time.monotonic()
    codes, _, _ = shards.read(2, 69)
    assert relay.cuts == 0 and 1.5 < time.monotonic() - started < 50
    np.testing.assert_array_equal(codes, sample(sum(SIZES[:2]) + 69)[0])
    said = caplog.text
    assert f"no data for {url}/shard-00002.tar from {relay.endpoint}" in said and "data.patience = 60 s" in said
    assert "resumed after" in said


def test_an_outage_beyond_the_patience_names_shard_endpoint_and_error(use_s3, folder, data):
    endpoint = f"http://127.0.0.1:{free_port()}"  # nobody listens there
    use_s3(endpoint)
    data.patience = 1.0
    info = load_manifest(folder).shards[0]
    with pytest.raises(UserError) as error:
        S3Store("s3://codes/train", data).open(info)
    for part in ("no data for s3://codes/train/shard-00000.tar", endpoint, "data.patience = 1", "Could not connect"):
        assert part in str(error.value)
    assert cached(data) == []
    with pytest.raises(
        StoreUnreachable, match="no data for s3://codes/train/shard-00000.tar"
    ):  # verify does not call the shard broken
        _check(S3Store("s3://codes/train", data), load_manifest(folder), info)


def test_an_outage_does_not_hold_up_the_end_of_a_loader(relay, use_s3, url, data):
    use_s3(relay.endpoint)
    source = loader(url, window=1, data=data)
    relay.cuts, relay.limit = 10**6, 0  # every answer is cut at once
    batches = iter(source)
    waiting = threading.Thread(target=lambda: next(batches, None), daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    started = time.monotonic()
    source.close()
    waiting.join(5)
    assert not waiting.is_alive() and time.monotonic() - started < 5
    assert not [t for t in threading.enumerate() if t.name in ("shard-read-ahead", "token-loader")]
    relay.cuts = 0
    assert len(take(source, 2)) == 2  # it can be iterated again


def test_a_cache_disk_that_fails_in_a_download_leaves_the_shards_in_memory(s3, use_s3, url, folder, data, monkeypatch):
    """A disk that fails while it is written, not when the space is reserved."""
    use_s3(s3)
    write, failures = os.pwrite, []

    def fail_on_the_disk(fd: int, part: bytes, at: int) -> int:
        if str(data.cache) in os.readlink(f"/proc/self/fd/{fd}"):
            failures.append(fd)
            raise OSError(5, "Input/output error")
        return write(fd, part, at)

    monkeypatch.setattr(os, "pwrite", fail_on_the_disk)
    with closing(ShardSet(url, data=data)) as remote, closing(ShardSet(folder)) as local:
        for i in range(3):
            assert (remote.read(1, i)[0] == local.read(1, i)[0]).all()
        assert failures and "buffers its shards in memory" in remote.store.degraded


def test_a_slow_server_is_reported_and_waited_for(relay, use_s3, url, folder, data, caplog, monkeypatch):
    monkeypatch.setattr("megastar.data.storage.stall_timer.REPORT_EVERY", 0.7)
    use_s3(relay.endpoint)
    data.patience = 0.5  # it is for outages
    shards = ShardSet(url, data=data)
    relay.pause = 0.4  # 16 KiB each time, a connection
    started = time.monotonic()
    codes, _, _ = shards.read(2, 69)
    assert 1.4 < time.monotonic() - started < 30
    np.testing.assert_array_equal(codes, sample(sum(SIZES[:2]) + 69)[0])
    said = re.findall(
        rf"slow: reading {url}/shard-00002.tar from {relay.endpoint} for \d+ s: ([\d.]+) MB so far, ([\d.]+) kB/s",
        caplog.text,
    )
    assert said and all(0 < float(mb) < 1 and float(rate) < 400 for mb, rate in said)


def test_a_server_that_falls_silent(relay, use_s3, url, data, monkeypatch):
    monkeypatch.setattr(
        "megastar.data.storage.stall_timer._SILENCE_GRACE", 0.5
    )  # no error yet: the sockets wait for 20 s
    use_s3(relay.endpoint)
    shards = ShardSet(url, data=data)
    shards.read(0, 0)
    shards.store.s3.patience = 1.0
    relay.pause = 10.0
    started = time.monotonic()
    with pytest.raises(UserError, match=r"shard-00001.tar from http.* for \d s .*, last error: no answer"):
        shards.read(1, 0)
    assert time.monotonic() - started < 8


# Objects that are not what the manifest records ------------------------------------------------------------------------
@pytest.fixture
def spoilt(s3, use_s3, folder, data, tmp_path):
    """A copy of the folder in a prefix of its own: (client, URL, prefix, bytes of shard 1)."""
    use_s3(s3)
    client, prefix = client_of(s3), f"spoilt/{tmp_path.name}"
    upload(client, folder, "codes", prefix)
    return client, f"s3://codes/{prefix}", prefix, (folder / "shard-00001.tar").read_bytes()


def test_cut_changed_and_missing_objects_are_named(spoilt, data):
    client, url, prefix, good = spoilt
    shards = ShardSet(url, data=data)
    shards.read(0, 0)
    other = bytearray(good)
    other[512 * 5 + 200] ^= 1  # a bit of a code: the tar stays readable
    for body, message in [
        (
            good[:-512],
            rf"shard-00001.tar has {len(good) - 512} bytes, the manifest records {len(good)}: it was truncated",
        ),
        (good + b"\0" * 512, rf"shard-00001.tar has {len(good) + 512} bytes, the manifest records {len(good)}"),
        (b"", rf"shard-00001.tar has 0 bytes, the manifest records {len(good)}"),
        (bytes(other), r"shard-00001.tar has SHA-256 [0-9a-f]{64}, the manifest records .* it was changed"),
    ]:
        client.put_object(Bucket="codes", Key=f"{prefix}/shard-00001.tar", Body=body)
        started = time.monotonic()
        with pytest.raises(UserError, match=message):
            shards.read(1, 0)
        assert time.monotonic() - started < 5
        with pytest.raises(UserError, match=message):
            take(loader(url, window=4, data=data), 30)
    client.delete_object(Bucket="codes", Key=f"{prefix}/shard-00001.tar")
    with pytest.raises(
        UserError, match=re.escape(f"{url}/shard-00001.tar does not exist at {shards.store.s3.endpoint}")
    ):
        shards.read(1, 0)
    assert shards.read(2, 1)[2] == SIZES[0] + SIZES[1] + 1  # the others can be read
    client.put_object(Bucket="codes", Key=f"{prefix}/shard-00001.tar", Body=good)
    assert verify(url, data) == []
    with pytest.raises(UserError, match=r"bucket nowhere of s3://nowhere/x/manifest.json does not exist at http"):
        load_manifest("s3://nowhere/x")
    with pytest.raises(UserError, match=r"s3://codes/x/manifest.json does not exist at http"):
        load_manifest("s3://codes/x")
    with pytest.raises(UserError, match=r"s3://Not_A_Bucket!/manifest.json cannot be requested .*correct the URL"):
        load_manifest("s3://Not_A_Bucket!")


def test_an_object_replaced_while_it_is_read(spoilt, relay, use_s3, data):
    client, url, prefix, good = spoilt
    use_s3(relay.endpoint)
    shards = ShardSet(url, data=data)
    relay.cuts, relay.limit = 1, 20_000
    relay.on_cut = lambda: client.put_object(Bucket="codes", Key=f"{prefix}/shard-00001.tar", Body=good[::-1])
    with pytest.raises(UserError, match=rf"{url}/shard-00001.tar changed while it was read"):
        shards.read(1, 0)
    assert cached(data) == []


# megastar data -----------------------------------------------------------------------------------------------------
def test_verify_reads_the_store_and_not_the_cache(spoilt, data, capsys):
    client, url, prefix, good = spoilt
    assert verify(url, data) == []
    whole = ShardSet(url, data=data)
    for shard in range(4):
        whole.read(shard, 0)  # all in the cache
    other = bytearray(good)
    other[512 * 5 + 200] ^= 1
    client.put_object(Bucket="codes", Key=f"{prefix}/shard-00001.tar", Body=bytes(other))
    client.delete_object(Bucket="codes", Key=f"{prefix}/shard-00003.tar")
    found = verify(url, data)
    assert [p.shard for p in found] == ["shard-00001.tar", "shard-00003.tar"]
    assert "has SHA-256" in found[0].reason and "does not exist at http" in found[1].reason
    assert cli.main(["data", "verify", url]) == 1 and "2 of 4 shards are damaged" in capsys.readouterr().out
    assert cli.main(["data", "inspect", url, "--cache", data.cache]) == 0
    assert "a/picture.0" in capsys.readouterr().out


# A run -------------------------------------------------------------------------------------------------------------
def test_a_run_from_s3_repeats_the_run_from_the_folder(s3, use_s3, world, whole, tmp_path):
    use_s3(s3)
    client = client_of(s3)
    for split in ("train", "val"):
        upload(client, world.codes(split), "codes", f"world/{split}")
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run")
    places = ["data.shards=s3://codes/world/train", "data.val_shards=s3://codes/world/val"]
    megastar("train", config, *places, f"data.cache={tmp_path / 'cache'}", ranks=2)
    assert rows(tmp_path / "run") == rows(whole)
    manifests = [json.loads((world.codes(s) / "manifest.json").read_text()) for s in ("train", "val")]
    names = sorted(f"{shard['sha256']}.tar" for m in manifests for shard in m["shards"])
    cache = tmp_path / "cache"
    assert sorted(p.name for p in cache.glob("*.*") if p.suffix != ".idx") == names  # no part or temporary file is left
