"""Shards: what the writer writes, WebDataset and the reader read; cut files are found."""

import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from megastar.data.files import sha256, write_atomic
from megastar.data.manifest import Manifest, load_manifest
from megastar.data.shard_set import ShardSet, verify
from megastar.data.shards import ShardWriter
from megastar.errors import UserError

VIEWS, T, V = 3, 16, 50


def sample(i: int) -> tuple[np.ndarray, int]:
    return np.random.default_rng(i).integers(0, V, (VIEWS, T)), i % 4


def write_set(folder, sizes=(5, 0, 4), **changes):
    """A folder of shards; ``changes`` falsify its manifest."""
    folder.mkdir(exist_ok=True)
    shards, i = [], 0
    for number, size in enumerate(sizes):
        with ShardWriter(folder / f"shard-{number:05d}.tar") as writer:
            for _ in range(size):
                writer.add(f"{i:09d}", *sample(i), f"a/picture.{i}")
                i += 1
        shards.append(writer.info())
    about = {
        "classes": list("abcd"),
        "grid": 4,
        "tokens": T,
        "views": VIEWS,
        "codebook_size": V,
        "crops": "center-flip",
        "image_size": 32,
    }
    manifest = Manifest(samples=i, tokenizer_sha256="ab" * 32, shards=shards, **about)
    write_atomic(folder / "manifest.json", (manifest.to_json()).encode())
    if changes:
        data = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(data))
    return folder


def test_round_trip(tmp_path):
    shards = ShardSet(write_set(tmp_path / "s"))
    assert len(shards) == 9 and shards.manifest.shard_sizes == (5, 0, 4)
    i = 0
    for shard, size in enumerate((5, 0, 4)):
        for k in range(size):
            codes, label, sample_id = shards.read(shard, k)
            expected, expected_label = sample(i)
            np.testing.assert_array_equal(codes, expected)
            assert (codes.dtype, label, sample_id) == (np.uint16, expected_label, i)
            i += 1
    assert load_manifest(tmp_path / "s") == shards.manifest == verify(tmp_path / "s")
    assert shards.manifest.format == 1 and shards.manifest.centre_view == 0
    assert replace(shards.manifest, crops="ten:1.1").centre_view == 4


def test_gather_picks_rows_and_views(tmp_path):
    shards = ShardSet(write_set(tmp_path / "s"), max_open=1)  # one map at a time: opened again and again
    ids, views = np.array([8, 0, 5, 4]), np.array([[0, 2], [1, 0], [2, 1], [1, 2]])
    codes, labels = shards.gather(ids, views)
    for row, i in enumerate(ids):
        np.testing.assert_array_equal(codes[row], sample(i)[0][views[row]])
    assert labels.tolist() == [i % 4 for i in ids] and len(shards._maps) == 1
    assert shards.where(8) == "shard-00002.tar, sample 3"


def test_webdataset_reads_the_same(tmp_path):
    wds = pytest.importorskip("webdataset")
    folder = write_set(tmp_path / "s", (5,))
    rows = list(wds.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False).decode())
    assert [r["__key__"] for r in rows] == [f"{i:09d}" for i in range(5)]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["codes.npy"], sample(i)[0])
        assert row["codes.npy"].dtype == np.uint16 and row["cls"] == sample(i)[1]
        assert row["json"] == {"source": f"a/picture.{i}"}


def test_bytes_depend_on_samples_only(tmp_path):
    a, b = write_set(tmp_path / "a"), write_set(tmp_path / "b")
    assert all(sha256(a / n) == sha256(b / n) for n in os.listdir(a))


def test_nothing_appears_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as writer:
        writer.add("0", *sample(0), "a")
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


def test_code_of_more_than_16_bits_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="code 65536 of 'a/1' does not fit in 16 bits"),
        ShardWriter(tmp_path / "x") as w,
    ):
        w.add("0", np.array([[65536]]), 0, "a/1")


# Broken sets ---------------------------------------------------------------------------------------------------
def member_ends(path) -> list[int]:
    with tarfile.open(path) as tar:
        return [m.offset_data + -(-m.size // 512) * 512 for m in tar]


def cut(folder, size: int, honest: bool) -> None:
    """Cut the last shard; ``honest``: tell the manifest the new size, so that only the contents betray it."""
    path = folder / "shard-00002.tar"
    os.truncate(path, size)
    if honest:
        data = json.loads((folder / "manifest.json").read_text())
        data["shards"][2]["bytes"] = size
        (folder / "manifest.json").write_text(json.dumps(data))


def test_cut_at_a_member_boundary(tmp_path):
    folder = write_set(tmp_path / "s")
    boundary = member_ends(folder / "shard-00002.tar")[8]  # three whole samples of four: tar readers see nothing wrong
    cut(folder, boundary, honest=False)
    with tarfile.open(folder / "shard-00002.tar") as tar:
        assert len(tar.getmembers()) == 9
    shards = ShardSet(folder)
    assert shards.read(0, 0)[2] == 0  # the other shards can be read
    with pytest.raises(UserError, match=r"shard-00002.tar has \d+ bytes, the manifest says \d+: it was cut"):
        shards.read(2, 0)
    cut(folder, boundary, honest=True)
    with pytest.raises(UserError, match=f"shard-00002.tar ends at byte {boundary} without tar's end mark: it was cut"):
        ShardSet(folder).read(2, 0)
    with (folder / "shard-00002.tar").open("r+b") as f:
        f.truncate(boundary + 1024)
    cut(folder, boundary + 1024, honest=True)
    with pytest.raises(UserError, match="shard-00002.tar holds 3 samples, the manifest says 4"):
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
    with pytest.raises(UserError, match=f"shard-00000.tar has a broken header at byte {position}"):
        ShardSet(folder).read(0, 0)


def test_flipped_bit_is_found_by_verify(tmp_path):
    folder = write_set(tmp_path / "s")
    with (folder / "shard-00000.tar").open("r+b") as f:
        f.seek(member_ends(folder / "shard-00000.tar")[1] - 512 + 200)
        f.write(b"\x07")
    with pytest.raises(UserError, match="shard-00000.tar has SHA-256 .* the manifest says"):
        verify(folder)


def test_missing_shard(tmp_path):
    folder = write_set(tmp_path / "s")
    (folder / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match="shard-00000.tar is missing though the manifest lists it"):
        ShardSet(folder).read(0, 0)


def test_other_shape_than_the_manifest(tmp_path):
    folder = write_set(tmp_path / "s", grid=8, tokens=64)
    with pytest.raises(
        UserError, match=r"uint16 of shape \(3, 16\), not 3 views of 64 codes in uint16 as the manifest says"
    ):
        ShardSet(folder).read(0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "has format 9, this version of megastar reads 1"),
        ({"samples": 8}, "promises 8 samples and its shards 9"),
        ({"shards": [{"nonsense": 1}]}, "is not a manifest of token shards"),
    ],
)
def test_bad_manifest(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_manifest(write_set(tmp_path / "s", **changes))


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match="folder .* does not exist: make it with `megastar pretokenize`"):
        load_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="has no manifest.json: pretokenize has not finished there"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{not json")
    with pytest.raises(UserError, match="is not a manifest of token shards"):
        load_manifest(tmp_path)
