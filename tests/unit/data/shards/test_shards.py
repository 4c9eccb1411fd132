"""Shards: what the writer writes, WebDataset and the reader read; cut files are found."""

import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.sample_parser import LAYOUTS
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import PackedWriter, open_writer
from megastar.errors import UserError
from megastar.utils.files import sha256, write_atomic

VIEWS, T, V = 3, 16, 50


def sample(i: int) -> tuple[np.ndarray, int]:
    return np.random.default_rng(i).integers(0, V, (VIEWS, T)), i % 4


def write_set(folder, sizes=(5, 0, 4), layout="plain", **changes):
    """A folder of shards; ``changes`` falsify its manifest."""
    folder.mkdir(exist_ok=True)
    shards, i = [], 0
    for number, size in enumerate(sizes):
        with open_writer(folder / f"shard-{number:05d}.tar", layout) as writer:
            for _ in range(size):
                writer.add(f"{i:09d}", *sample(i), f"a/picture.{i}")
                i += 1
        shards.append(writer.info())
    fields = {
        "classes": list("abcd"),
        "grid": 4,
        "tokens": T,
        "views": VIEWS,
        "codebook_size": V,
        "crops": "center-flip",
        "image_size": 32,
    }
    manifest = Manifest(samples=i, tokenizer_sha256="ab" * 32, shards=shards, layout=layout, **fields)
    write_atomic(folder / "manifest.json", (manifest.to_json()).encode())
    if changes:
        data = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(data))
    return folder


layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_round_trip(tmp_path, layout):
    shards = ShardSet(write_set(tmp_path / "s", layout=layout))
    assert len(shards) == 9 and shards.manifest.shard_sizes == (5, 0, 4)
    i = 0
    for shard, size in enumerate((5, 0, 4)):
        for k in range(size):
            codes, label, sample_id = shards.read(shard, k)
            expected, expected_label = sample(i)
            np.testing.assert_array_equal(codes, expected)
            assert (codes.dtype, label, sample_id) == (np.uint16, expected_label, i)
            assert not codes.flags.owndata and codes.flags.aligned
            i += 1
        assert shards.sources(shard) == [f"a/picture.{k}" for k in range(i - size, i)]
    assert load_manifest(tmp_path / "s") == shards.manifest and verify(tmp_path / "s") == []
    assert shards.manifest.format == 1 and shards.manifest.centre_view == 0
    assert replace(shards.manifest, crops="ten:1.1", views=10).centre_view == 4


@layouts
@pytest.mark.parametrize("resident", [0, 1 << 30])  # read by calls, or through the maps
@pytest.mark.parametrize("max_open", [1, 2, 64])
def test_gather_picks_rows_and_views(tmp_path, layout, resident, max_open):
    shards = ShardSet(write_set(tmp_path / "s", layout=layout), max_open=max_open, resident=resident)
    rng = np.random.default_rng(0)
    for size in (4, 1, 30):  # more rows than samples: one may come twice
        ids, views = rng.integers(0, 9, size), rng.integers(0, VIEWS, (size, 2))
        codes, labels = shards.gather(ids, views)
        for row, i in enumerate(ids):
            np.testing.assert_array_equal(codes[row], sample(i)[0][views[row]])
        assert (codes.dtype, labels.dtype) == (np.uint16, np.int64)
        assert labels.tolist() == [i % 4 for i in ids] and len(shards._maps) <= max_open
    assert shards.gather(np.empty(0, np.int64), np.empty((0, 2), np.int64))[0].shape == (0, 2, T)
    assert shards.where(8) == "shard-00002.tar, sample 3"
    for ids, views in (([9], [[0]]), ([-1], [[0]]), ([0], [[VIEWS]]), ([0], [[-1]])):
        with pytest.raises(IndexError, match="a sample outside 0 to 8, or a view outside 0 to 2"):
            shards.gather(ids, np.array(views))


@pytest.mark.parametrize("resident", [0, 1 << 30])
def test_large_samples(tmp_path, resident):
    views, tokens = 5, 64 * 64
    every = np.random.default_rng(0).integers(0, 2**16, (3, views, tokens)).astype(np.uint16)
    with open_writer(tmp_path / "shard-00000.tar", "packed") as writer:
        for i, codes in enumerate(every):
            writer.add(f"{i}", codes, i, "a")
    fields = {"classes": list("abc"), "grid": 64, "tokens": tokens, "views": views, "codebook_size": 2**16}
    fields |= {"crops": "ten:1.1", "image_size": 64, "tokenizer_sha256": "", "layout": "packed"}
    (tmp_path / "manifest.json").write_text(Manifest(samples=3, shards=[writer.info()], **fields).to_json())
    shards, chosen = ShardSet(tmp_path, resident=resident), np.array([[4, 0], [2, 2], [1, 3], [0, 1]])
    codes, _ = shards.gather([2, 0, 1, 2], chosen)
    for row, i in enumerate([2, 0, 1, 2]):
        np.testing.assert_array_equal(codes[row], every[i][chosen[row]])


def test_a_shard_cut_under_a_reader_is_an_error(tmp_path):
    for resident in (0, 1 << 30):  # to touch a map beyond its file's end would kill the process
        folder = write_set(tmp_path / f"{resident}")
        shards = ShardSet(folder, resident=resident)
        shards.open(0)
        os.truncate(folder / "shard-00000.tar", 512)
        with pytest.raises(
            UserError, match=r"shard-00000.tar has 512 bytes, the manifest records \d+: it was truncated"
        ):
            shards.gather([1], np.zeros((1, 1), np.int64))


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Three times ``resident`` of shards, all of them read: what the process holds stays below it."""
    n, views, tokens = 1500, 10, 1024
    codes = np.ones((views, tokens), np.int64)
    infos = []
    for number in range(2):
        with open_writer(tmp_path / f"shard-{number:05d}.tar", "packed") as writer:
            for i in range(n):
                writer.add(f"{i}", codes, 0, "a")
        infos.append(writer.info())
    fields = {"classes": ["a"], "grid": 32, "tokens": tokens, "views": views, "codebook_size": 2, "crops": "ten:1.1"}
    fields |= {"image_size": 64, "tokenizer_sha256": "", "layout": "packed"}
    (tmp_path / "manifest.json").write_text(Manifest(samples=2 * n, shards=infos, **fields).to_json())
    shards = ShardSet(tmp_path, resident=20 << 20)
    shards.gather([0], np.zeros((1, 1), np.int64))
    before = resident_bytes()
    for first in range(0, 2 * n, 250):
        shards.gather(np.arange(first, first + 250), np.zeros((250, 2), np.int64))
    assert sum(i.bytes for i in infos) > 60e6 and resident_bytes() - before < 20 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_webdataset_reads_the_same(tmp_path):
    wds = pytest.importorskip("webdataset")
    folder = write_set(tmp_path / "s", (5,))
    rows = list(wds.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False).decode())
    assert [r["__key__"] for r in rows] == [f"{i:09d}" for i in range(5)]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["codes.npy"], sample(i)[0])
        assert row["codes.npy"].dtype == np.uint16 and row["cls"] == sample(i)[1]
        assert row["json"] == {"source": f"a/picture.{i}"}


def test_webdataset_reads_packed_blocks(tmp_path, monkeypatch):
    wds = pytest.importorskip("webdataset")
    monkeypatch.setattr("megastar.data.shards.writer._BLOCK_SAMPLES", 2)
    folder = write_set(tmp_path / "s", (5,), layout="packed")
    blocks = list(wds.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False).decode())
    assert [(b["__key__"], len(b["cls.npy"])) for b in blocks] == [("000000000", 2), ("000000002", 2), ("000000004", 1)]
    codes = np.concatenate([b["codes.npy"] for b in blocks])
    np.testing.assert_array_equal(codes, np.stack([sample(i)[0] for i in range(5)]))
    assert codes.dtype == np.uint16 and np.concatenate([b["cls.npy"] for b in blocks]).tolist() == [0, 1, 2, 3, 0]
    assert [s for b in blocks for s in b["json"]["sources"]] == [f"a/picture.{i}" for i in range(5)]
    assert ShardSet(folder).sources(0) == [f"a/picture.{i}" for i in range(5)]
    np.testing.assert_array_equal(ShardSet(folder).read(0, 3)[0], sample(3)[0])


def test_blocks_are_bounded_by_samples_and_bytes(tmp_path):
    for tokens, expected in ((16, [256, 44]), (128 * 128, [32] * 9 + [12])):
        with PackedWriter(tmp_path / "x.tar") as writer:
            for i in range(300):
                writer.add(f"{i}", np.zeros((1, tokens), np.int64), 0, "a")
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert [len(json.load(tar.extractfile(m))["sources"]) for m in tar if m.name.endswith("json")] == expected


@layouts
def test_bytes_depend_on_samples_only(tmp_path, layout):
    a, b = write_set(tmp_path / "a", layout=layout), write_set(tmp_path / "b", layout=layout)
    names = sorted(os.listdir(a))
    assert names == sorted(os.listdir(b)) and len(names) == 7  # three shards, their indexes, the manifest
    assert all(sha256(a / n) == sha256(b / n) for n in names)


def test_two_may_write_the_same_shard(tmp_path):
    with open_writer(tmp_path / "x.tar") as first, open_writer(tmp_path / "x.tar") as second:
        for writer in (first, second):
            writer.add("0", *sample(0), "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.idx", "x.tar"] and first.info() == second.info()
    assert sha256(tmp_path / "x.tar") == first.info().sha256


def test_unknown_layout(tmp_path):
    with pytest.raises(UserError, match="layout 'zip' is unknown: use plain or packed"):
        open_writer(tmp_path / "x.tar", "zip")


@layouts
def test_nothing_appears_when_writing_fails(tmp_path, layout):
    with pytest.raises(RuntimeError), open_writer(tmp_path / "x.tar", layout) as writer:
        writer.add("0", *sample(0), "a")
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "most"), [("uint16", 65536), ("int32", 262144)])
@pytest.mark.parametrize("code", [-1, 0])
def test_a_code_that_does_not_fit_is_refused(tmp_path, dtype, most, code):
    code = code or most
    with (
        pytest.raises(
            UserError, match=f"code {code} of 'a/1' does not fit {dtype}: use a tokenizer with at most {most}"
        ),
        open_writer(tmp_path / "x", dtype=dtype) as w,
    ):
        w.add("0", np.array([[code]]), 0, "a/1")


# Broken sets ---------------------------------------------------------------------------------------------------
def member_ends(path) -> list[int]:
    with tarfile.open(path) as tar:
        return [m.offset_data + -(-m.size // 512) * 512 for m in tar]


def record(folder):
    """Make the manifest agree with the tars, as if a faulty writer had written them."""
    data = json.loads((folder / "manifest.json").read_text())
    for shard in data["shards"]:
        path = folder / shard["name"]
        shard |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(data))


def cut(folder, size: int, honest: bool) -> None:
    """Cut the last shard; ``honest``: tell the manifest, so that only the contents betray it."""
    os.truncate(folder / "shard-00002.tar", size)
    if honest:
        record(folder)


def test_cut_at_a_member_boundary(tmp_path):
    folder = write_set(tmp_path / "s")
    boundary = member_ends(folder / "shard-00002.tar")[8]  # three whole samples of four: tar readers see nothing wrong
    cut(folder, boundary, honest=False)
    with tarfile.open(folder / "shard-00002.tar") as tar:
        assert len(tar.getmembers()) == 9
    shards = ShardSet(folder)
    assert shards.read(0, 0)[2] == 0  # the other shards can be read
    with pytest.raises(UserError, match=r"shard-00002.tar has \d+ bytes, the manifest records \d+: it was truncated"):
        shards.read(2, 0)
    cut(folder, boundary, honest=True)
    with pytest.raises(
        UserError, match=f"shard-00002.tar ends at byte {boundary} without an end-of-archive marker: it was truncated"
    ):
        ShardSet(folder).read(2, 0)
    with (folder / "shard-00002.tar").open("r+b") as f:
        f.truncate(boundary + 1024)
    cut(folder, boundary + 1024, honest=True)
    with pytest.raises(UserError, match="shard-00002.tar holds 3 samples, the manifest records 4"):
        ShardSet(folder).read(2, 0)


def test_cut_inside_a_member(tmp_path):
    folder = write_set(tmp_path / "s")
    cut(folder, member_ends(folder / "shard-00002.tar")[7] - 400, honest=True)
    with pytest.raises(UserError, match="ends inside 000000007.codes.npy"):
        ShardSet(folder).read(2, 0)


def test_broken_header_in_the_middle(tmp_path):
    folder = write_set(tmp_path / "s")
    path = folder / "shard-00000.tar"
    position = member_ends(path)[4]
    with path.open("r+b") as f:
        f.seek(position + 10)
        f.write(b"\xff\xff")
    record(folder)
    with pytest.raises(UserError, match=f"shard-00000.tar has a broken header at byte {position}"):
        ShardSet(folder).read(0, 0)


def test_flipped_bit_is_found_by_verify(tmp_path):
    folder = write_set(tmp_path / "s")
    with (folder / "shard-00000.tar").open("r+b") as f:
        f.seek(member_ends(folder / "shard-00000.tar")[1] - 512 + 200)
        f.write(b"\x07")
    (problem,) = verify(folder)
    assert str(problem).startswith("shard-00000.tar: has SHA-256 ") and "the manifest records" in problem.reason


def test_missing_shard(tmp_path):
    folder = write_set(tmp_path / "s")
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match="shard-00000.tar is missing though the manifest lists it"):
        ShardSet(folder).read(0, 0)


def test_other_shape_than_the_manifest(tmp_path):
    folder = write_set(tmp_path / "s", grid=8, tokens=64)
    with pytest.raises(
        UserError, match=r"uint16 of shape \(3, 16\), not 3 views of 64 codes in uint16 as the manifest records"
    ):
        ShardSet(folder).read(0, 0)
