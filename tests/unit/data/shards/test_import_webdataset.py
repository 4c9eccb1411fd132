"""Sets that plain `webdataset` writers made: indexed, read back equal, trained on; and what is wrong with others."""

import io
import json
import logging
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from megastar import cli
from megastar.config.schema import TokenizerConfig
from megastar.data.loader import validation_batches
from megastar.data.shards.import_webdataset import index_webdataset
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.verify import verify
from megastar.engine.input_pipeline.data_checks import downsample_of
from megastar.errors import UserError
from megastar.evaluation.image_sources import open_images
from megastar.evaluation.linear_probe import load_crops
from megastar.tokenizer.io import save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from tests.loaders import make_loader
from tests.unit.data.shards.test_shards import record, write_set
from tests.unit.data.shards.test_tar_reader import tar_of

wds = pytest.importorskip("webdataset")
VIEWS, T, V, CLASSES = 3, 16, 50, 4


def codes_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, V, (VIEWS, T))


def foreign(folder, sizes=(7, 5), dtype="uint16", name="npy", shape=(VIEWS, T), label="cls"):
    """As many people write it: ShardWriter with keys, an array and a class."""
    folder.mkdir(exist_ok=True)
    i = 0
    for number, size in enumerate(sizes):
        with wds.TarWriter(str(folder / f"train-{number:03d}.tar")) as writer:
            for _ in range(size):
                array = codes_of(i).astype(dtype)[: shape[-2] if len(shape) > 1 else 1].reshape(shape)
                sample = {"__key__": f"n{number:02d}/sample{i:06d}", name: array}
                sample |= (
                    {"cls": i % CLASSES} if label == "cls" else {"json": {"label": i % CLASSES, "source": f"s{i}"}}
                )
                writer.write(sample)
                i += 1
    return folder


@pytest.fixture
def logged(monkeypatch):
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)  # for caplog


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
def test_every_dtype_reads_back_equal(tmp_path, dtype):
    folder = foreign(tmp_path / "f", dtype=dtype)
    manifest = index_webdataset(folder, codebook_size=V)
    assert (manifest.samples, manifest.views, manifest.tokens, manifest.grid) == (12, VIEWS, T, 4)
    assert manifest.dtype == dtype and manifest.classes == ["0", "1", "2", "3"]
    assert [s.name for s in manifest.shards] == ["train-000.tar", "train-001.tar"]
    assert manifest == load_manifest(folder) and verify(folder) == [] and (folder / "train-001.idx").is_file()
    for resident in (0, 1 << 30):
        shards = ShardSet(folder, resident=resident)
        ids, views = np.arange(12)[::-1], np.tile([2, 0], (12, 1))
        codes, labels = shards.gather(ids, views)
        np.testing.assert_array_equal(codes, np.stack([codes_of(i)[[2, 0]] for i in ids]))
        assert codes.dtype == np.uint16 and labels.tolist() == [i % CLASSES for i in ids]
        np.testing.assert_array_equal(shards.read(1, 2)[0], codes_of(9))
    assert shards.sources(1)[0] == "n01/sample000007"  # the set records no other name


@pytest.mark.parametrize("shape", [(T,), (1, T), (VIEWS, T), (1, VIEWS, T)])
@pytest.mark.parametrize("name", ["npy", "codes.npy"])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_every_shape_and_name_reads_back_equal(tmp_path, shape, name, label):
    folder = foreign(tmp_path / "f", shape=shape, name=name, label=label)
    views = 1 if shape[0] != VIEWS and len(shape) < 3 else VIEWS
    assert index_webdataset(folder, codebook_size=V, crops="center").views == views
    shards = ShardSet(folder)
    codes, labels = shards.gather(np.arange(12), np.full((12, 1), views - 1))
    np.testing.assert_array_equal(codes[:, 0], np.stack([codes_of(i)[views - 1] for i in range(12)]))
    assert labels.tolist() == [i % CLASSES for i in range(12)]
    if label == "json":
        assert shards.sources(0) == [f"s{i}" for i in range(7)]


def test_it_trains_as_it_is(tmp_path):
    """Through the loader: over two epochs each sample comes twice, with its own codes and class."""
    folder = foreign(tmp_path / "f", dtype="int64")
    index_webdataset(folder, codebook_size=V)
    settings = {"seed": 3, "global_batch": 6, "views": 2, "class_dropout_prob": 0.1, "num_classes": CLASSES}
    loader = make_loader(folder, vocab_size=V, tokens=T, **settings)
    batches = iter(loader)
    seen = []
    for _ in range(4):
        batch = next(batches)
        for row, i in enumerate(batch["ids"].tolist()):
            stored = {tuple(view) for view in codes_of(i).tolist()}
            assert {tuple(view) for view in batch["codes"][row].tolist()} <= stored
            assert batch["true_labels"][row] == i % CLASSES
            seen.append(i)
    batches.close()
    loader.close()
    assert sorted(seen) == sorted([*range(12), *range(12)])
    assert validation_batches(ShardSet(folder), 4, 4)[0]["codes"].shape == (4, 1, T)


def test_indexed_again_and_never_over_pretokenize(tmp_path):
    folder = foreign(tmp_path / "f")
    first = index_webdataset(folder, codebook_size=V)
    assert index_webdataset(folder, codebook_size=V) == first
    assert index_webdataset(folder, codebook_size=V, classes=list("abcde")).classes == list("abcde")
    assert index_webdataset(folder, codebook_size=V, classes=6).classes == ["0", "1", "2", "3", "4", "5"]
    own = write_set(tmp_path / "own")
    before = (own / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="has a manifest.json written by pretokenize and needs no index"):
        index_webdataset(own, codebook_size=V)
    assert (own / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_own_shards_that_lost_their_manifest(tmp_path, layout):
    folder = write_set(tmp_path / "s", (5, 0, 4), layout)
    there = load_manifest(folder)
    for path in [folder / "manifest.json", *folder.glob("*.idx")]:
        path.unlink()
    made = index_webdataset(folder, codebook_size=V, layout=layout, tokenizer_sha256="ab" * 32, crops="center-flip")
    assert (made.shards, made.tokenizer_sha256, made.centre_view) == (there.shards, there.tokenizer_sha256, 0)
    assert load_manifest(folder) == made and verify(folder) == []


def test_a_size_that_is_not_known_is_recorded_as_such(tmp_path, caplog, logged):
    folder = foreign(tmp_path / "f")
    manifest = index_webdataset(folder, codebook_size=V)
    assert manifest.image_size == 0 == downsample_of(manifest) and load_manifest(folder) == manifest
    assert f"{folder}: the size of the images is not known and recorded as 0: give it with --image-size" in caplog.text
    caplog.clear()
    manifest = index_webdataset(folder, codebook_size=V, image_size=32)
    assert manifest.image_size == 32 and downsample_of(manifest) == 8 and "size of the images" not in caplog.text
    with pytest.raises(
        UserError, match="image size 30 is not a multiple of the 4 codes of a side in token shard .*train-000"
    ):
        index_webdataset(folder, codebook_size=V, image_size=30)
    old = replace(
        manifest, image_size=64, made_by={"writer": manifest.made_by["writer"]}
    )  # the guess of earlier versions
    assert downsample_of(old) == 0


def test_the_centre_view_is_named_or_told(tmp_path, caplog, logged):
    folder = foreign(tmp_path / "f")
    manifest = index_webdataset(folder, codebook_size=V)
    note = "crops 'foreign' of 3 views do not determine the centre crop: view 0, the first, is used as the centre crop"
    assert f"{folder}: {note}" in caplog.text and manifest.centre_view == 0
    assert "centre" not in json.loads((folder / "manifest.json").read_text())  # as earlier versions wrote it
    caplog.clear()
    codes, _ = load_crops(folder)
    assert (codes == [codes_of(i)[0] for i in range(12)]).all() and f"{folder}: {note}" in caplog.text
    caplog.clear()
    manifest = index_webdataset(folder, codebook_size=V, centre_view=2)
    assert manifest.centre_view == 2 == load_manifest(folder).centre_view and not manifest.centre_note
    codes, _ = load_crops(folder)
    assert (codes == [codes_of(i)[2] for i in range(12)]).all()
    batches = validation_batches(ShardSet(folder), 12, 12)
    assert (batches[0]["codes"][:, 0].numpy() == codes).all() and "centre crop" not in caplog.text
    for crops in "center-flip", "center+ten:1.1":
        assert not index_webdataset(folder, codebook_size=V, crops=crops).centre_note
    single = foreign(tmp_path / "one", shape=(1, T))
    assert not index_webdataset(single, codebook_size=V).centre_note and "centre crop" not in caplog.text
    before = (folder / "manifest.json").read_bytes()
    for view in (3, -1, 5000):
        with pytest.raises(UserError, match=f"centre view {view} (is not one of the 3 views|must be 0 to 1023)"):
            index_webdataset(folder, codebook_size=V, centre_view=view)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("field", "value"), [("centre", 3), ("centre", -2), ("image_size", -1), ("image_size", 2**40)])
def test_impossible_numbers_of_a_manifest(tmp_path, field, value):
    folder = foreign(tmp_path / "f")
    index_webdataset(folder, codebook_size=V)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(
        UserError, match=r"manifest.json (names view -?\d of 3 as the centre crop|has images of -?\d+ pixels)"
    ):
        load_manifest(folder)


def test_the_options_of_the_command(tmp_path, capsys):
    folder = foreign(tmp_path / "f")
    words = ["data", "index", str(folder), "--codebook-size", str(V)]
    assert cli.main([*words, "--centre-view", "1", "--image-size", "64"]) == 0
    manifest = load_manifest(folder)
    assert (manifest.centre_view, manifest.image_size) == (1, 64)
    assert (
        cli.main([*words, "--centre-view", "7"]) != 0 and "centre view 7 is not one of the 3" in capsys.readouterr().err
    )


def test_a_reference_of_a_set_that_records_no_size_has_that_of_its_tokenizer(tmp_path):
    tokenizer = tmp_path / "t.safetensors"
    config = TokenizerConfig(16, 4, [1, 2, 2], 1, 8, V, 4, norm_groups=2)
    save_tokenizer(VQModel(config), tokenizer, {})
    folder = foreign(tmp_path / "f")
    views, hashes = [], []
    for view in (None, 1, 0):
        index_webdataset(folder, codebook_size=V, centre_view=view)
        images = open_images(folder, tokenizer=tokenizer, size=16)
        assert (images.height, images.width) == (16, 16)
        views.append(np.concatenate(list(images.batches(12))))
        hashes.append(images.sha256())
    assert views[0].shape == (12, 16, 16, 3) and (views[0] == views[2]).all() and (views[0] != views[1]).any()
    assert hashes[0] == hashes[2] != hashes[1]  # else a cached reference would be that of another view


def test_a_tokenizer_gives_hash_and_code_book(tmp_path):
    tiny = TokenizerConfig(
        image_size=16,
        channels=4,
        channel_multipliers=[1, 2],
        res_blocks=1,
        norm_groups=2,
        z_channels=8,
        codebook_size=32,
    )
    model, path = VQModel(tiny), tmp_path / "t.safetensors"
    save_tokenizer(model, path, {})
    folder = tmp_path / "f"
    folder.mkdir()
    side, size = model.config.grid, model.config.codebook_size
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        writer.write({"__key__": "a", "npy": np.full(side**2, size - 1), "cls": 0})
    manifest = index_webdataset(folder, tokenizer=path)
    assert (manifest.tokenizer_sha256, manifest.codebook_size) == (tokenizer_hash(path), size)
    assert (manifest.grid, manifest.image_size) == (side, model.config.image_size)
    with pytest.raises(UserError, match="image size 8 differs from the 16 of tokenizer"):
        index_webdataset(folder, tokenizer=path, image_size=8)
    with pytest.raises(UserError, match="codebook_size 7 differs from the"):
        index_webdataset(folder, tokenizer=path, codebook_size=7)
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        writer.write({"__key__": "a", "npy": np.zeros((side + 1) ** 2, np.int64), "cls": 0})
    with pytest.raises(UserError, match=rf"a.tar: a.npy has {(side + 1) ** 2} codes per view, not {side} x {side}"):
        index_webdataset(folder, tokenizer=path)


# What cannot be trained on ---------------------------------------------------------------------------------------
def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array))
    return out.getvalue()


GOOD = [("a.npy", npy(np.zeros((2, 16), np.uint16))), ("a.cls", b"0")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"contains no samples in 1 tars: members must be named KEY.codes.npy, or KEY.npy"),
        ([("a.jpg", b"x"), ("b.txt", b"y")], "contains no samples in 1 tars"),
        (
            [*GOOD, ("b.npy", GOOD[0][1]), ("a.npy", GOOD[0][1])],
            "x.tar holds a.npy and a.npy for the same key: keys must",
        ),
        ([*GOOD, ("a.codes.npy", GOOD[0][1])], "x.tar holds a.codes.npy and a.npy for the same key"),
        ([*GOOD, ("a.cls", b"1")], "x.tar holds a.cls and a.cls for the same key"),
        ([*GOOD, ("b.npy", GOOD[0][1])], "x.tar: b.npy has no class: write b.cls"),
        ([*GOOD, ("b.npy", GOOD[0][1]), ("b.json", b"{}")], r"x.tar: b.json has no class: write a .cls member"),
        ([*GOOD, ("b.npy", GOOD[0][1]), ("b.json", b'{"label": true}')], "x.tar: b.json has no class"),
        ([*GOOD, ("b.npy", GOOD[0][1]), ("b.json", b"{")], "x.tar: b.json is not JSON"),
        ([*GOOD, ("b.npy", GOOD[0][1]), ("b.json", b"[" * 100_000)], "x.tar: b.json is not JSON"),
        ([*GOOD, ("b.cls", b"1")], "x.tar: b.cls has no codes, b.codes.npy"),
        ([GOOD[0], ("a.cls", b"cat")], "x.tar: a.cls is not a class number: write it in decimal digits"),
        ([GOOD[0], ("a.cls", b"9" * 60)], "x.tar: a.cls is not a class number"),
        ([GOOD[0], ("a.cls", b"9" * 16)], "x.tar: a has class 9999999999999999, outside 0 to 1048575"),
        ([GOOD[0], ("a.cls", b"-1")], "x.tar: a has class -1, outside 0 to"),
        ([("a.npy", npy(np.full((2, 16), 50))), ("a.cls", b"0")], "a.npy holds code 50, outside the codebook of 50"),
        ([("a.npy", npy(np.full((2, 16), -1))), ("a.cls", b"0")], "a.npy holds code -1, outside the codebook of 50"),
        (
            [*GOOD, ("b.npy", npy(np.zeros((3, 16), np.uint16))), ("b.cls", b"0")],
            r"b.npy is uint16 of shape \(3, 16\), not",
        ),
        (
            [*GOOD, ("b.npy", npy(np.zeros((2, 25), np.uint16))), ("b.cls", b"0")],
            "not 2 views of 16 codes in uint16 as in",
        ),
        ([*GOOD, ("b.npy", npy(np.zeros((2, 16), np.int64))), ("b.cls", b"0")], "b.npy is int64 of shape"),
        (
            [("a.npy", npy(np.zeros((2, 15), np.uint16))), ("a.cls", b"0")],
            "a.npy has 15 codes per view, not a square number",
        ),
        (
            [("a.npy", npy(np.zeros((2, 2, 16), np.uint16))), ("a.cls", b"0")],
            r"of shape \(2, 2, 16\), not of shape \(views, T\)",
        ),
        (
            [("a.npy", npy(np.zeros((0, 16), np.uint16))), ("a.cls", b"0")],
            r"of shape \(0, 16\), not of shape \(views, T\)",
        ),
        ([("a.npy", npy(np.zeros((2, 16)))), ("a.cls", b"0")], "a.npy must hold integers in C order"),
        ([("a.npy", npy(np.zeros((2, 16), ">u2"))), ("a.cls", b"0")], "a.npy must hold integers in C order"),
        ([("a.npy", npy(np.zeros((2, 16), np.uint16, order="F"))), ("a.cls", b"0")], "must hold integers in C order"),
        ([("a.npy", npy(np.array([{"a": 1}], object))), ("a.cls", b"0")], "a.npy must hold integers in C order"),
        (
            [("a.npy", GOOD[0][1][:-1]), ("a.cls", b"0")],
            r"a.npy has 191 bytes, an array of uint16 of shape \(2, 16\) has 192",
        ),
        ([("a.npy", b"not an array"), ("a.cls", b"0")], "a.npy is not a numpy array"),
        ([("a.npy", b""), ("a.cls", b"0")], "a.npy is not a numpy array"),
    ],
)
def test_one_sentence_names_file_and_member(tmp_path, members, message):
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    with pytest.raises(UserError, match=message):
        index_webdataset(tmp_path, codebook_size=V)
    assert not (tmp_path / "manifest.json").exists()


def test_shards_of_different_shapes(tmp_path):
    foreign(tmp_path, (2,))
    foreign(tmp_path / "g", (2,), shape=(2, T))
    shutil.copy(tmp_path / "g" / "train-000.tar", tmp_path / "zoo.tar")
    with pytest.raises(
        UserError, match=r"zoo.tar: n00/sample000000.npy is uint16 of shape \(2, 16\), not 3 views of 16"
    ):
        index_webdataset(tmp_path, codebook_size=V)


def test_settings_and_folders_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="does not exist: name the folder that holds the tars"):
        index_webdataset(tmp_path / "none", codebook_size=V)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"contains no .tar: give the folder"):
        index_webdataset(tmp_path, codebook_size=V)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="a.tar is empty: copy it again or remove it"):
        index_webdataset(tmp_path, codebook_size=V)
    with pytest.raises(UserError, match="the codebook of .* is unknown: give its tokenizer, or codebook_size"):
        index_webdataset(tmp_path)
    with pytest.raises(UserError, match="codebook_size 300000 must be 1 to 262144"):
        index_webdataset(tmp_path, codebook_size=300000)
    with pytest.raises(UserError, match="grid 0 must be 1 to 1024"):
        index_webdataset(tmp_path, codebook_size=V, grid=0)
    with pytest.raises(UserError, match="train-000.tar: n00/sample000003 has class 3, outside 0 to 2"):
        index_webdataset(foreign(tmp_path / "f"), codebook_size=V, classes=3)


def test_a_tar_that_was_cut_is_found(tmp_path):
    folder = foreign(tmp_path / "f", (4,))
    path = folder / "train-000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar]
    for end in ends:
        path.write_bytes(whole[:end])  # where webdataset sees nothing wrong
        with pytest.raises(
            UserError, match="train-000.tar ends at byte .* without an end-of-archive marker: it was truncated"
        ):
            index_webdataset(folder, codebook_size=V)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megastar.data.storage.store.write_atomic", refuse)
    with pytest.raises(
        UserError, match=r"cannot write .*train-000.idx \(Permission denied\): make the folder writable"
    ):
        index_webdataset(foreign(tmp_path / "f"), codebook_size=V)


def test_codes_that_changed_since_are_found_by_training(tmp_path):
    folder = foreign(tmp_path / "f", (4,), dtype="int64")
    data = json.loads(index_webdataset(folder, codebook_size=V).to_json())
    tar = bytearray((folder / "train-000.tar").read_bytes())
    at = ShardSet(folder).index(0).offsets[1]
    tar[at : at + 8] = (-3).to_bytes(8, "little", signed=True)
    (folder / "train-000.tar").write_bytes(tar)
    (folder / "manifest.json").write_text(json.dumps(data))
    record(folder)
    with pytest.raises(UserError, match=r"holds codes from -3 to \d+, outside the vocabulary of 50"):
        ShardSet(folder).gather([1], np.zeros((1, 1), np.int64))
