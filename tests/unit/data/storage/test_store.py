"""Stores: the cache's protocol, stalls, permanent errors, the shards to read ahead."""

import os
import threading
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, IncompleteReadError

from megastar.config.schema import DataConfig
from megastar.data.order import OrderSpec, shards_from
from megastar.data.storage import s3_client
from megastar.data.storage.errors import CacheFull, Stopped
from megastar.data.storage.s3_client import S3Folder, split_url
from megastar.data.storage.shard_cache import ShardCache
from megastar.data.storage.shard_info import ShardInfo
from megastar.data.storage.stall_timer import StallTimer, run_in_threads
from megastar.data.storage.store import FolderStore, is_remote, open_store
from megastar.errors import UserError
from megastar.utils.files import sha256
from tests.loaders import epoch_order


def info(number: int, size: int = 1000) -> ShardInfo:
    return ShardInfo(f"shard-{number:05d}.tar", 1, size, f"{number:064x}")


def put(cache: ShardCache, shard: ShardInfo) -> None:
    part = cache.claim(shard)
    assert part is not None and cache.reserve(part, shard, required=True)
    part.write(bytes(shard.bytes))
    part.flush()
    cache.commit(part, shard).close()


def names(cache: ShardCache) -> list[str]:
    return sorted(f"{int(p.stem, 16)}{p.suffix}" for p in cache.folder.iterdir() if p.name != "lock")


# The order ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_the_shards_ahead_are_those_the_order_touches(window):
    sizes = (7, 0, 6, 8, 5, 1)
    spec = OrderSpec(3, sizes, window)
    ends = np.cumsum(sizes)
    touched = [int(np.searchsorted(ends, i, side="right")) for e in range(2) for i in epoch_order(spec, e)]
    for position in range(spec.samples):
        ahead = list(islice(shards_from(spec, position), window))
        assert touched[position] in ahead and 1 not in ahead
        following = list(islice(shards_from(spec, position), 2 * (len(sizes) - 1)))
        assert set(touched[position : position + spec.samples]) <= set(following)


# The cache ---------------------------------------------------------------------------------------------------------
def test_one_process_claims_a_shard_and_the_others_find_it(tmp_path):
    cache, other = ShardCache(tmp_path / "c", 10_000), ShardCache(tmp_path / "c", 10_000)
    assert cache.open(info(1)) is None
    part = cache.claim(info(1))
    assert part is not None and other.claim(info(1)) is None and other.open(info(1)) is None
    assert cache.activity(info(1)) > 0 and cache.activity(info(2)) == 0
    assert cache.reserve(part, info(1), required=False)
    held = cache.commit(part, info(1))
    assert other.claim(info(1)) is None
    with other.open(info(1)) as f:
        assert len(f.read()) == 1000
    held.close()
    assert names(cache) == ["1.tar"]


def test_the_least_recently_used_is_removed_and_what_is_in_use_stays(tmp_path):
    cache = ShardCache(tmp_path / "c", 3000)
    for number in (1, 2, 3):
        put(cache, info(number))
        os.utime(cache.folder / f"{number:064x}.tar", (number, number))
    cache.open(info(1)).close()  # used: now 2 is the oldest
    held = cache.open(info(3))
    os.utime(cache.folder / f"{3:064x}.tar", (3, 3))
    put(cache, info(4))
    assert names(cache) == ["1.tar", "3.tar", "4.tar"]
    part = cache.claim(info(5))
    assert cache.reserve(part, info(5, 2500), required=False) is False  # 3 is in use
    assert cache.reserve(part, info(5, 2500), required=True)
    cache.discard(part, info(5))
    assert names(cache) == ["3.tar"]
    held.close()


def test_a_cut_shard_of_the_cache_is_dropped(tmp_path):
    cache = ShardCache(tmp_path / "c", 10_000)
    put(cache, info(1))
    os.truncate(cache.folder / f"{1:064x}.tar", 10)
    assert cache.open(info(1)) is None and names(cache) == []


def test_a_cut_shard_that_somebody_reads_is_replaced_beside_it(tmp_path):
    """Otherwise it could not be fetched again while that reader exists."""
    cache, shard = ShardCache(tmp_path, 10_000), info(1)
    put(cache, shard)
    reader = cache.open(shard)
    assert reader is not None
    os.truncate(tmp_path / f"{shard.sha256}.tar", 10)
    assert cache.open(shard) is None
    put(cache, shard)
    assert (again := cache.open(shard)) is not None and os.fstat(again.fileno()).st_size == shard.bytes


def test_leftovers_are_swept_and_claims_are_not(tmp_path):
    cache = ShardCache(tmp_path / "c", 10_000)
    (cache.folder / f"{7:064x}.part").write_bytes(b"left")
    part = cache.claim(info(8))
    ShardCache(tmp_path / "c", 10_000)
    assert names(cache) == ["8.part"]
    (cache.folder / f"{9:064x}.part").write_bytes(b"left")
    taken = cache.claim(info(9))  # without a sweep
    assert os.fstat(taken.fileno()).st_size == 0
    for f, shard in ((part, info(8)), (taken, info(9))):
        cache.discard(f, shard)
    assert names(cache) == []


def test_a_folder_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="data.cache = .*file/c cannot be used .*: set it to a folder on a disk of this node"
    ):
        ShardCache(tmp_path / "file" / "c", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = ShardCache("", 1).folder
    assert mine == tmp_path / f"megastar-{os.getuid()}" and mine.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    (tmp_path / "megastar-12345").mkdir()
    with pytest.raises(UserError, match="megastar-12345 is a link, belongs to another user, or others may write to it"):
        ShardCache("", 1)


def test_a_full_disk_and_an_invalid_hash(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "c", 10_000)
    part = cache.claim(info(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"shard-00001.tar \(1000 bytes\) cannot be written to the cache .*\(No space left"
    ):
        cache.reserve(part, info(1), required=True)
    cache.discard(part, info(1))
    with pytest.raises(
        UserError,
        match="the manifest records the SHA-256 '../x' for a.tar, not 64 hexadecimal digits: pretokenize again",
    ):
        cache.open(ShardInfo("a.tar", 1, 1, "../x"))


def test_an_index_goes_with_its_shard_and_counts(tmp_path):
    cache = ShardCache(tmp_path / "c", 3000)
    cache.keep_index(info(1), b"of a shard that is not here")
    assert cache.index(info(1)) is None and names(cache) == []
    for number in (1, 2):
        put(cache, info(number))
        os.utime(cache.folder / f"{number:064x}.tar", (number, number))
        cache.keep_index(info(number), bytes([number]) * 100)
    assert cache.index(info(1)) == b"\1" * 100 and names(cache) == ["1.idx", "1.tar", "2.idx", "2.tar"]
    put(cache, info(3, 900))  # 1000 + 100 + 1000 + 100 + 900 is too much
    assert names(cache) == ["2.idx", "2.tar", "3.tar"] and cache.index(info(1)) is None
    cache.keep_index(info(3), bytes(1 << 20))  # more than any index of such a shard
    assert cache.index(info(3)) is None
    for left in (f"{7:064x}.idx", f"{2:064x}.idx.1-ab.tmp"):
        (cache.folder / left).write_bytes(b"left")
        os.utime(cache.folder / left, (1, 1))
    ShardCache(tmp_path / "c", 3000)
    assert names(cache) == ["2.idx", "2.tar", "3.idx", "3.tar"]


def test_a_folder_keeps_indexes_beside_the_shards_where_it_may(tmp_path, monkeypatch):
    store, tar = FolderStore(tmp_path), tmp_path / "shard-00001.tar"
    assert store.index(info(1)) is None
    tar.touch()
    store.keep_index(info(1), b"first")
    store.keep_index(info(1), b"second")
    assert store.index(info(1)) == b"second" and sorted(p.name for p in tmp_path.iterdir()) == [
        "shard-00001.idx",
        tar.name,
    ]

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("megastar.data.storage.store.write_atomic", read_only)
    store.keep_index(info(1), b"third")
    assert store.index(info(1)) == b"second"
    os.utime(tar, (2e9, 2e9))  # written after its index
    assert store.index(info(1)) is None


# A stall -----------------------------------------------------------------------------------------------------------
def test_a_stall_is_reported_every_ten_seconds_and_ends_with_the_last_error(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megastar.data.storage.stall_timer.time.monotonic", lambda: now[0])
    messages: list[str] = []
    stop = threading.Event()
    timer = StallTimer("s3://b/x.tar", "http://store", 35.0, messages.append, stop)
    for now[0] in np.arange(0, 30.1, 0.5):
        timer.tick()
        timer.failed(OSError("no route"))
    assert len(messages) == 3 and messages[0].startswith(
        "stalled for 10 s: no data for s3://b/x.tar from http://store (no route); retrying for up to data.patience = 35 s"
    )
    timer.progress()
    assert messages[3:] == ["reading s3://b/x.tar from http://store resumed after 30 s"]
    now[0] = 100.0
    timer.tick()  # bytes may be on the way
    assert messages.pop().startswith("stalled for 70 s: no data for s3://b/x.tar from http://store (no answer yet)")
    timer.failed(ValueError())
    with pytest.raises(
        UserError,
        match=r"no data for s3://b/x.tar from http://store for 70 s \(data.patience = 35\), last error: ValueError; run",
    ):
        timer.tick()
    timer.last_error, now[0] = "", 125.5
    with pytest.raises(UserError, match=r"from http://store for 96 s .*, last error: no answer; run the same"):
        timer.tick()
    stop.set()
    with pytest.raises(Stopped):
        timer.tick()


def test_slow_progress_is_reported_and_not_limited(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megastar.data.storage.stall_timer.time.monotonic", lambda: now[0])
    messages: list[str] = []
    timer = StallTimer("s3://b/x.tar", "http://store", 5.0, messages.append, threading.Event())
    for now[0] in np.arange(0, 95, 1.0):
        timer.tick()
        timer.progress(2000)
    assert len(messages) == 9
    assert messages[1] == "slow: reading s3://b/x.tar from http://store for 20 s: 0.04 MB so far, 2 kB/s"


def test_the_first_error_of_several_threads_comes_out_and_ends_them():
    timer = StallTimer("x", "y", 10, print, threading.Event())

    def wait() -> None:
        timer.cancelled.wait(30)

    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        run_in_threads([wait, fail, wait], timer)
    assert timer.cancelled.is_set()


# Answers -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def remote() -> Iterator[S3Folder]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        values = {"AWS_ENDPOINT_URL_S3": "http://store:1", "AWS_EC2_METADATA_DISABLED": "true"}
        values |= {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
        for name, value in values.items():
            patch.setenv(name, value)
        yield S3Folder("s3://bucket/some/prefix/")


def answer(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "reason"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "NoSuchBucket", "bucket bucket of s3://bucket/some/prefix/a.tar does not exist at http://store:1: correct"),
        (404, "NoSuchKey", "s3://bucket/some/prefix/a.tar does not exist at http://store:1: upload the whole folder"),
        (403, "AccessDenied", r"denies access to s3://bucket/some/prefix/a.tar \(AccessDenied\) and no credentials were found"),
        (412, "PreconditionFailed", "s3://bucket/some/prefix/a.tar changed while it was read"),
        (301, "PermanentRedirect", r"rejects the request for s3://bucket/some/prefix/a.tar \(PermanentRedirect, reason\): the bucket is in another region: correct the region"),
    ],
)  # fmt: skip
def test_permanent_errors(remote, monkeypatch, status, code, sentence):
    with pytest.raises(UserError, match=sentence):
        remote.raise_if_permanent(answer(status, code), "a.tar")
    if status == 403:
        monkeypatch.setattr(remote, "signed", True)
        with pytest.raises(
            UserError, match=r"\(AccessDenied\): use credentials that may read it \(those used are from"
        ):
            remote.raise_if_permanent(answer(status, code), "a.tar")


@pytest.mark.parametrize(
    "error",
    [
        answer(503, "SlowDown"), answer(500, "InternalError"), answer(429, "TooManyRequests"),
        answer(400, "ExpiredToken"), answer(408, "RequestTimeout"), answer(400, "RequestTimeout"), ConnectionResetError(),
        ConnectTimeoutError(endpoint_url="x"), IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ],
)  # fmt: skip
def test_errors_worth_a_retry_are_not_raised(remote, error):
    remote.raise_if_permanent(error, "a.tar")


def test_a_bug_is_not_retried(remote):
    with pytest.raises(ZeroDivisionError):
        remote.raise_if_permanent(ZeroDivisionError(), "a.tar")


def test_a_server_without_ranges_or_if_match(remote, monkeypatch):
    timer = StallTimer("x", "y", 10, print, threading.Event())
    monkeypatch.setattr(remote.client, "get_object", lambda **_: {"ETag": "a"})
    with pytest.raises(
        UserError, match=r"http://store:1 does not support ranged GETs \(s3://bucket/some/prefix/a.tar\)"
    ):
        remote.head("a.tar")
    monkeypatch.setattr(remote.client, "get_object", lambda **_: {"ETag": "b", "ContentRange": "bytes 0-1/2"})
    with pytest.raises(UserError, match="changed while it was read"):
        remote._read_part("a.tar", "a", 0, 2, None, timer)


def test_requests_without_credentials_are_unsigned(remote):
    from botocore import UNSIGNED

    assert not remote.signed and remote.client.meta.config.signature_version is UNSIGNED


# What others may have planted in a cache ---------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".tar", ".part", ".idx"])
def test_a_planted_link_is_replaced_and_its_target_stays(tmp_path, suffix):
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 1000)
    cache, shard = ShardCache(tmp_path / "c", 10_000), info(1)
    path = cache.folder / f"{shard.sha256}{suffix}"
    path.symlink_to(victim)
    assert cache.open(shard) is None and cache.index(shard) is None
    put(cache, shard)
    cache.keep_index(shard, b"index")
    with cache.open(shard) as f:
        assert f.read() == bytes(1000)
    ShardCache(tmp_path / "c", 10_000)  # sweeps
    assert victim.read_bytes() == b"x" * 1000


def test_a_planted_lock_file_is_named(tmp_path):
    (tmp_path / "c").mkdir(mode=0o700)
    (tmp_path / "victim").write_bytes(b"x")
    (tmp_path / "c" / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"data.cache = .*c cannot be used \(.*c/lock is a symbolic link\)"):
        ShardCache(tmp_path / "c", 1)


def test_a_folder_in_the_place_of_a_shard(tmp_path):
    cache, shard = ShardCache(tmp_path / "c", 10_000), info(1)
    (cache.folder / f"{shard.sha256}.tar").mkdir()
    with pytest.raises(CacheFull, match="cannot be written to the cache"):
        cache.open(shard)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_files_of_other_users_are_not_used(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert ShardCache(shared, 1).folder == shared / "megastar-0"
    cache, shard = ShardCache(tmp_path / "c", 10_000), info(1)
    put(cache, shard)
    path = cache.folder / f"{shard.sha256}.tar"
    os.chown(path, 12345, 12345)
    assert cache.open(shard) is None and not path.exists()
    put(cache, shard)
    cache.keep_index(shard, b"index")
    os.chown(path.with_suffix(".idx"), 12345, 12345)
    assert cache.index(shard) is None
    (cache.folder / f"{shard.sha256}.part").write_bytes(b"theirs")
    os.chown(cache.folder / f"{shard.sha256}.part", 12345, 12345)
    cache.claim(info(1))
    os.chown(cache.folder / "lock", 12345, 12345)
    with pytest.raises(UserError, match=r"lock is not a file of this user alone\): set it to a folder on a disk"):
        ShardCache(tmp_path / "c", 1)


# Which store -------------------------------------------------------------------------------------------------------
def test_stores_and_urls(tmp_path):
    assert isinstance(open_store(tmp_path), FolderStore) and is_remote("s3://b") and not is_remote(tmp_path)
    assert is_remote("S3://b") and split_url("S3://Bucket/a") == ("Bucket", "a")
    assert split_url("s3://bucket/a/b/") == ("bucket", "a/b") and split_url("s3://bucket") == ("bucket", "")
    with pytest.raises(UserError, match="s3:///a: must have the form s3://bucket/prefix"):
        split_url("s3:///a")
    assert DataConfig().patience == 1800 and s3_client.PART == 8 << 20
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
