"""The index beside a shard: used where it fits, made again where it does not."""

import os
import tarfile

import numpy as np
import pytest

from megastar.data.shards.features import StoredFeatures
from megastar.data.shards.index import ShardIndex, pack_index
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.sample_parser import Expected
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import open_writer
from megastar.data.storage.store import FolderStore
from tests.unit.data.shards.test_shards import VIEWS, T, layouts, record, sample, write_set


def read_all(folder) -> None:
    shards = ShardSet(folder)
    i = 0
    for shard, size in enumerate(shards.manifest.shard_sizes):
        for k in range(size):
            codes, label, _ = shards.read(shard, k)
            np.testing.assert_array_equal(codes, sample(i)[0])
            assert label == sample(i)[1]
            i += 1


@layouts
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "longer", "of another shard", "older"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path, layout, harm):
    folder = write_set(tmp_path / "s", (5, 5), layout)
    path, whole = folder / "shard-00000.idx", (folder / "shard-00000.idx").read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "of another shard":
        path.write_bytes((folder / "shard-00001.idx").read_bytes())
    elif harm == "older":
        os.utime(path, (1, 1))
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-1], "longer": whole + b"x"}[harm])
    read_all(folder)
    assert path.read_bytes() == whole and path.stat().st_mtime > 1


@layouts
def test_every_flipped_byte_of_an_index_is_found(tmp_path, layout):
    folder = write_set(tmp_path / "s", (2,), layout)
    path = folder / "shard-00000.idx"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        read_all(folder)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("features", [None, StoredFeatures("efflite0", "cd" * 32, "block 10", 4, 2)])
def test_an_index_of_many_samples_is_read(tmp_path, monkeypatch, features):
    with open_writer(tmp_path / "shard-00000.tar", "packed", features=features) as writer:
        for i in range(1000):
            more = () if features is None else (np.zeros((VIEWS, T, 2), np.float16),)
            writer.add(f"{i:09d}", *sample(i), f"a/picture.{i}", *more)
    store = FolderStore(tmp_path)
    assert store.index(writer.info()) == (tmp_path / "shard-00000.idx").read_bytes()


def test_an_index_is_used_instead_of_a_walk(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s")
    monkeypatch.setattr("megastar.data.shards.reader.find_samples", None)
    read_all(folder)


def test_a_tar_replaced_by_one_of_the_same_size_has_its_own_index(tmp_path):
    """The arrays of the new tar lie elsewhere: its class has more digits, its note fewer."""
    folder = tmp_path / "s"
    write_set(folder, (2,))
    other = write_set(tmp_path / "other", (2,)) / "shard-00000.tar"
    with tarfile.open(folder / "shard-00000.tar", "w") as out, tarfile.open(other) as tar:
        for member in sorted(tar, key=lambda m: m.name.rpartition(".")[2]):
            out.addfile(member, tar.extractfile(member))
    newer = (folder / "shard-00000.tar").stat().st_mtime_ns + 10**9
    os.utime(folder / "shard-00000.idx", ns=(newer, newer))
    record(folder)
    read_all(folder)


def test_a_folder_that_cannot_be_written_is_read_without_an_index(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s")
    for path in folder.glob("*.idx"):
        path.unlink()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megastar.data.storage.store.write_atomic", refuse)
    read_all(folder)
    assert not list(folder.glob("*.idx"))


def test_verify_finds_an_index_that_lies(tmp_path):
    folder = write_set(tmp_path / "s")
    shards = ShardSet(folder)
    info, true = shards.manifest.shards[0], shards.index(0)
    lie = ShardIndex(true.offsets[::-1].copy(), true.labels)
    (folder / "shard-00000.idx").write_bytes(pack_index(lie, info, "plain", Expected("uint16", VIEWS, T)))
    assert list(map(str, verify(folder))) == [
        "shard-00000.tar: its index shard-00000.idx does not match its samples: remove it, and it is rebuilt"
    ]
    (folder / "shard-00000.idx").write_bytes(b"not an index at all")  # which no reader would use
    assert verify(folder) == []
