"""Features in shards: written, indexed, read and verified in both layouts; damaged and hostile ones are found."""

import io
import json
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest

from megastar.data.shards.features import StoredFeatures, check_same_features, not_finite, stored_features
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.sample_parser import LAYOUTS
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import open_writer
from megastar.errors import UserError
from megastar.utils.files import sha256
from tests.unit.data.shards.test_shards import VIEWS, T, V, sample, write_set

WIDTH = 5
STORED = StoredFeatures("efflite0", "cd" * 32, "block 10", 4, WIDTH)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def features_of(i: int) -> np.ndarray:
    return np.random.default_rng([i, 7]).normal(size=(VIEWS, T, WIDTH)).astype(np.float16)


def write_features(folder, sizes=(5, 0, 4), layout="plain", stored=STORED, change=lambda i, x: x):
    folder.mkdir(exist_ok=True)
    shards, i = [], 0
    for number, size in enumerate(sizes):
        with open_writer(folder / f"shard-{number:05d}.tar", layout, features=stored) as writer:
            for _ in range(size):
                writer.add(f"{i:09d}", *sample(i), f"a/picture.{i}", change(i, features_of(i)))
                i += 1
        shards.append(writer.info())
    manifest = Manifest(
        samples=i, classes=list("abcd"), grid=4, tokens=T, views=VIEWS, codebook_size=V, crops="center-flip",
        image_size=32, tokenizer_sha256="ab" * 32, shards=shards, layout=layout, features=asdict(stored),
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def names_in(path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


@layouts
@pytest.mark.parametrize("max_open", [1, 64])
def test_round_trip(tmp_path, layout, max_open):
    folder = write_features(tmp_path / "s", layout=layout)
    rng = np.random.default_rng(0)
    for known in (True, False):  # with the index, and from a walk over the tar
        shards = ShardSet(folder, max_open=max_open)
        assert shards.manifest.stored_features == STORED and load_manifest(folder) == shards.manifest
        ids, views = rng.integers(0, 9, 40), rng.integers(0, VIEWS, (40, 2))
        found = shards.gather_features(ids, views)
        assert found.dtype == np.float16 and found.shape == (40, 2, T, WIDTH)
        for b, (i, chosen) in enumerate(zip(ids, views, strict=True)):
            np.testing.assert_array_equal(found[b], features_of(i)[chosen])
        codes, _ = shards.gather(ids, views)
        np.testing.assert_array_equal(codes[3], sample(ids[3])[0][views[3]])
        shards.close()
        for path in folder.glob("*.idx"):
            assert known or path.stat().st_size
            path.unlink()
    assert verify(folder) == []


@layouts
def test_a_set_without_features_is_what_it_was(tmp_path, layout):
    plain, more = write_set(tmp_path / "a", layout=layout), write_features(tmp_path / "b", layout=layout)
    assert "features" not in json.loads((plain / "manifest.json").read_text())
    assert load_manifest(plain).stored_features is None
    names, before = names_in(more / "shard-00000.tar"), names_in(plain / "shard-00000.tar")
    assert layout == "packed" or [n for n in names if "features" not in n] == before
    assert [n for n in names if "features" in n]
    # A reader that knows of no features reads the codes.
    record = json.loads((more / "manifest.json").read_text())
    del record["features"]
    (more / "manifest.json").write_text(json.dumps(record))
    shards = ShardSet(more)
    codes, labels = shards.gather(np.arange(9), np.zeros((9, 1), np.int64))
    assert all(np.array_equal(codes[i, 0], sample(i)[0][0]) and labels[i] == sample(i)[1] for i in range(9))


def test_packed_blocks_are_bounded_with_their_features(tmp_path):
    wide = replace(STORED, width=6000)  # 3 x 16 x 6000 numbers are 0.6 MB
    big = np.zeros((VIEWS, T, 6000), np.float16)
    folder = write_features(tmp_path / "s", (4,), "packed", wide, change=lambda i, _: big + i)
    assert len([n for n in names_in(folder / "shard-00000.tar") if n.endswith("features.npy")]) == 4
    assert (ShardSet(folder).gather_features([2], np.zeros((1, 1), np.int64)) == 2).all()


@layouts
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_named(tmp_path, layout, value):
    def spoil(i, features):
        if i in (3, 7):
            features[1, 2, 0] = value
        return features

    folder = write_features(tmp_path / "s", layout=layout, change=spoil)
    reasons = [str(p) for p in verify(folder)]
    assert reasons == [
        "shard-00000.tar: sample 3 holds features that are not finite (1 such samples)",
        "shard-00002.tar: sample 2 holds features that are not finite (1 such samples)",
    ]
    shards = ShardSet(folder)
    shards.gather_features([3, 7], np.zeros((2, 1), np.int64))  # another view
    with pytest.raises(UserError, match="shard-00002.tar, sample 2 of .* holds features that are not finite: find all"):
        shards.gather_features([0, 7], np.ones((2, 1), np.int64))


def test_the_exponent_decides_what_is_finite():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[:, None]
    np.testing.assert_array_equal(not_finite(every), ~np.isfinite(every[:, 0]))


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members(layout: str) -> dict[str, bytes]:
    codes, features = np.zeros((VIEWS, T), np.uint16), np.ones((VIEWS, T, WIDTH), np.float16)
    if layout == "packed":
        return {
            "k.cls.npy": npy(np.array([1])), "k.codes.npy": npy(codes[None]), "k.features.npy": npy(features[None]),
            "k.json": b'{"sources": ["a"]}',
        }  # fmt: skip
    return {"k.cls": b"1", "k.codes.npy": npy(codes), "k.features.npy": npy(features), "k.json": b"{}"}


def lead(data: bytes) -> bytes:
    """The array with a leading dimension, as a block of one sample."""
    return npy(np.load(io.BytesIO(data))[None])


HOSTILE = {
    "none": (None, "has no features, k.features.npy"),
    "wider": (npy(np.ones((VIEWS, T, WIDTH + 1), np.float16)), "has shape"),
    "fewer patches": (npy(np.ones((VIEWS, T - 1, WIDTH), np.float16)), "has shape"),
    "fewer views": (npy(np.ones((VIEWS - 1, T, WIDTH), np.float16)), "has shape"),
    "float32": (npy(np.ones((VIEWS, T, WIDTH), np.float32)), "must hold numbers in C order (float16)"),
    "integers": (npy(np.ones((VIEWS, T, WIDTH), np.uint16)), "must hold numbers in C order (float16)"),
    "columns": (npy(np.asfortranarray(np.ones((VIEWS, T, WIDTH), np.float16))), "must hold numbers in C order"),
    "no array": (b"x" * 100, "is not a numpy array"),
    "empty": (b"", "is not a numpy array"),
    "cut": (npy(np.ones((VIEWS, T, WIDTH), np.float16))[:-2], "an array of float16 of shape"),
    "longer": (npy(np.ones((VIEWS, T, WIDTH), np.float16)) + b"xx", "an array of float16 of shape"),
}


@layouts
@pytest.mark.parametrize("case", HOSTILE)
def test_a_tar_with_other_features_is_refused(tmp_path, layout, case):
    data, message = HOSTILE[case]
    found = members(layout) | ({} if data is None else {"k.features.npy": data})
    if data is None:
        del found["k.features.npy"]
    elif layout == "packed" and case in ("wider", "fewer patches", "fewer views"):
        found["k.features.npy"] = lead(data)
    refused(tmp_path, layout, found, message)


@layouts
def test_features_without_codes_are_refused(tmp_path, layout):
    found = members(layout)
    refused(tmp_path, layout, found | {"other.features.npy": found["k.features.npy"]}, "has no codes, other.codes.npy")
    refused(tmp_path, layout, found | {"k.FEATURES.npy": found["k.features.npy"]}, "for the same key")


def refused(tmp_path, layout: str, found: dict[str, bytes], message: str) -> None:
    folder = write_features(tmp_path / "s", (1,), layout)
    path = folder / "shard-00000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in found.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    record = json.loads((folder / "manifest.json").read_text())
    record["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"shard-00000\.tar") as error:
        ShardSet(folder).gather_features([0], np.zeros((1, 1), np.int64))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert any(message in problem.reason for problem in verify(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 7}, "has features on a grid of 7 x 7, its tokens have 4 x 4"),
        ({"width": 0}, "a width of 0"), ({"width": 10**9}, "a width of"), ({"grid": -4}, "a grid of -4"),
        ({"width": 5.0}, "features.width is 5.0"), ({"width": True}, "features.width is True"),
        ({"encoder": ""}, "features are of encoder ''"), ({"encoder": "x" * 400}, "features are of encoder"),
        ({"layer": "\x1b[31m"}, "features are of encoder"), ({"weights_sha256": "no"}, "SHA-256 'no'"),
        ({"dtype": "float64"}, "this version of megastar reads float16"), ({"pool": 0}, "a pool of 0"),
        ({"width": 60000}, "declares 5 samples of"),
    ],
)  # fmt: skip
def test_an_impossible_record_is_refused(tmp_path, change, message):
    folder = write_features(tmp_path / "s")
    record = json.loads((folder / "manifest.json").read_text())
    record["features"] |= change
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="manifest.json") as error:
        load_manifest(folder)
    assert message in str(error.value)


def test_a_record_that_lacks_a_field_is_refused():
    with pytest.raises(ValueError, match=r"features\.width is None"):
        stored_features({k: v for k, v in asdict(STORED).items() if k != "width"})
    assert stored_features(asdict(STORED) | {"later": 1}) == STORED and stored_features({}) is None


def test_sets_with_other_features_do_not_fit():
    check_same_features(STORED, STORED, "a", "b")
    check_same_features(STORED, None, "a", "b")
    other = replace(STORED, weights_sha256="ef" * 32)
    with pytest.raises(UserError, match="a has features of efflite0 .*cdcdcd.* b of efflite0 .*efefef"):
        check_same_features(STORED, other, "a", "b")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    folder = write_features(tmp_path / "s")
    shards = ShardSet(folder)
    shards.gather_features([0], np.zeros((1, 1), np.int64))
    with (folder / "shard-00000.tar").open("r+b") as f:
        f.truncate(2000)
    with pytest.raises(UserError, match="has 2000 bytes, the manifest records"):
        shards.gather_features([0], np.zeros((1, 1), np.int64))
