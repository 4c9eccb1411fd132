"""Whatever is done to a shard, its index or the manifest: the true data or a ``UserError``, within memory and time."""

import json
import shutil
import tracemalloc
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastar.data.shards.import_webdataset import index_webdataset
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.sample_parser import LAYOUTS
from megastar.data.shards.tar_reader import walk
from megastar.data.shards.verify import verify
from megastar.errors import UserError
from tests.unit.data.shards.test_shards import V, sample, write_set

SIZES = (3, 2)
PLACES = ("shard-00000.tar", "shard-00000.idx", "manifest.json")
few = settings(max_examples=35, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp(request.param) / "whole", SIZES, request.param)


@contextmanager
def bounded(limit: int = 32 << 20):
    """Nothing here needs more memory than the files are large, be they ever so hostile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read_everything(folder: Path, sources: bool = True) -> int:
    """Read all samples in three ways; how many were as written. Raises ``UserError``."""
    right = 0
    for resident in (0, 1 << 30):
        with closing(ShardSet(folder, resident=resident)) as shards:
            m = shards.manifest
            ids = np.arange(min(len(shards), 1000))
            codes, labels = shards.gather(ids, np.tile(np.arange(min(m.views, 3)), (len(ids), 1)))
            for i in ids:
                expected, label = sample(int(i))
                same = codes[i].shape == expected.shape and (codes[i] == expected).all() and labels[i] == label
                right += bool(same)
    for number in range(len(m.shards) if sources else 0):
        shards.sources(number)
    shards.close()
    return right


def try_folder(folder: Path, exact: bool) -> None:
    """``exact``: what is read without an error must be what was written."""
    around = sorted(p.name for p in folder.parent.iterdir())
    with bounded():
        try:
            right = read_everything(folder)
            assert right == 2 * sum(SIZES) or not exact
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
    assert sorted(p.name for p in folder.parent.iterdir()) == around


def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "box", ignore_errors=True)
    return shutil.copytree(whole, tmp_path / "box" / "s")


def tell_manifest(folder: Path) -> None:
    """Let the manifest say the size that the first shard has now, so that only the contents betray it."""
    data = json.loads((folder / "manifest.json").read_text())
    data["shards"][0]["bytes"] = (folder / "shard-00000.tar").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(data))


@few
@given(data=st.data())
def test_cut_at_any_byte(whole, tmp_path, data):
    for name in PLACES:
        folder = copy(whole, tmp_path)
        path = folder / name
        size = data.draw(st.integers(0, path.stat().st_size - 1), name)
        with path.open("r+b") as f:
            f.truncate(size)
        if name.endswith(".tar") and data.draw(st.booleans(), "honest"):
            tell_manifest(folder)
        try_folder(folder, exact=True)


@few
@given(data=st.data())
def test_changed_headers_are_errors_or_harmless(whole, tmp_path, data):
    """Without the index, so that the headers are read; the codes themselves have only their SHA-256."""
    folder = copy(whole, tmp_path)
    (folder / "shard-00000.idx").unlink()
    path = folder / "shard-00000.tar"
    tar = bytearray(path.read_bytes())
    members = list(walk(bytes(tar), "x"))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from(members)).start
        at = start - 512 + data.draw(st.integers(0, 511))
        tar[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans(), "with a right sum"):
        head = start - 512
        tar[head + 148 : head + 156] = b" " * 8
        tar[head + 148 : head + 156] = b"%06o\0 " % sum(tar[head : head + 512])
    path.write_bytes(tar)
    # A name may be another now, and so a sample's class or place: then the hash tells, here only the bounds.
    try_folder(folder, exact=False)
    if tar != (whole / "shard-00000.tar").read_bytes():
        assert {p.shard for p in verify(folder)} == {"shard-00000.tar"}


@few
@given(data=st.data())
def test_changed_bytes_anywhere(whole, tmp_path, data):
    for name in PLACES:
        folder = copy(whole, tmp_path)
        path = folder / name
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try_folder(folder, exact=name.endswith(".idx"))


@few
@given(st.binary(max_size=3000), st.sampled_from(PLACES))
def test_any_bytes_at_all(whole, tmp_path, content, name):
    folder = copy(whole, tmp_path)
    (folder / name).write_bytes(content)
    if name.endswith(".tar"):
        tell_manifest(folder)
    try_folder(folder, exact=True)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**40, -1, 0, 1.5, float("nan"), float("inf")]),
    st.sampled_from(
        ["", "..", "../shard-00001.tar", "/etc/passwd", "a/b.tar", "\0.tar", "shard-00001.tar", "x" * 5000]
    ),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@few
@given(data=st.data())
def test_hostile_manifests(whole, tmp_path, data):
    folder = copy(whole, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest["shards"]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([manifest, *shards]))
        if data.draw(st.integers(0, 9)) == 0:
            place.pop(data.draw(st.sampled_from(sorted(place))), None)
        else:
            place[data.draw(st.sampled_from(sorted(place)) if place else st.just("x"))] = data.draw(HOSTILE)
    if data.draw(st.booleans(), "consistent") and isinstance(manifest.get("shards"), list):
        counts = [s.get("samples") for s in shards]
        if all(isinstance(n, int) for n in counts):
            manifest["samples"] = sum(counts)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try_folder(folder, exact=False)


@few
@given(data=st.data())
def test_hostile_indexes_with_a_right_sum(whole, tmp_path, data):
    """Offsets out of the file, and anything else in it, though the check sum is right."""
    import hashlib

    folder = copy(whole, tmp_path)
    path = folder / "shard-00000.idx"
    body = bytearray(path.read_bytes()[:-32])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 8))
        word = data.draw(st.sampled_from([-1, 2**62, -(2**63), 0, 512, 10_000]) | st.integers(-(2**63), 2**63 - 1))
        body[at : at + 8] = word.to_bytes(8, "little", signed=True)
    path.write_bytes(bytes(body) + hashlib.sha256(body).digest())
    try_folder(folder, exact=False)


@few
@given(data=st.data())
def test_foreign_sets_of_any_bytes(whole, tmp_path, data):
    """Indexing reads every header and every array: the set is refused, or what it holds is read as it is there."""
    folder = copy(whole, tmp_path)
    for path in [folder / "manifest.json", *folder.glob("*.idx")]:
        path.unlink()
    path = folder / "shard-00000.tar"
    tar = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(tar) - 1))
        tar[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            head = at // 512 * 512
            tar[head + 148 : head + 156] = b" " * 8
            tar[head + 148 : head + 156] = b"%06o\0 " % sum(tar[head : head + 512])
    path.write_bytes(tar[: data.draw(st.sampled_from([len(tar), len(tar) - 512, len(tar) // 2]))])
    with bounded():
        try:
            made = index_webdataset(folder, codebook_size=V, layout=whole.parent.name.rstrip("0123456789"))
        except UserError as error:
            assert "\n" not in str(error)
            return
        assert load_manifest(folder) == made and verify(folder) == []
        read_everything(folder, sources=False)  # a note may be broken: no code or class hangs on it
