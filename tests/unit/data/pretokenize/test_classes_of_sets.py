"""Classes of a set: recorded in the manifest, told in the last line, unchanged when a set is continued."""

import json
from pathlib import Path

import numpy as np
import pytest

from megastar.commands import data, pretokenize
from megastar.config.load import load_config
from megastar.data.images.classes import Choice
from megastar.data.shards.class_counts import class_summary, count_classes, reasons_in_words
from megastar.data.shards.class_names import read_class_names
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.writer import ShardWriter
from megastar.data.storage.store import FolderStore
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.errors import UserError
from tests.unit.data.images.test_bit_depths import RAMP, saved
from tests.unit.data.images.test_dataset import make_folder, make_tar, png
from tests.unit.data.pretokenize.test_runner import QUIET, notes, run, tokenizer  # noqa: F401

TREE = {f"{c}/{part}/{i}.png": png(10 * i) for c, n in (("cat", 4), ("dog", 2)) for part in "xy" for i in range(n)}


@pytest.fixture
def tree(tmp_path):
    return make_folder(tmp_path / "tree", TREE)


def make(source, tokenizer, out, **changes):  # noqa: F811
    return run(source, tokenizer, out, **{"subset": None, "crops": "center", "workers": 1, **changes})


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_last_line_names_the_classes(tree, tokenizer, tmp_path, notes, capsys):  # noqa: F811
    manifest = make(tree, tokenizer, tmp_path / "out")
    assert manifest.classes == ["cat", "dog"] and manifest.class_counts == [8, 4]
    wanted = "2 classes (folder level 1, in string order): smallest 'dog' with 4 images, largest 'cat' with 8 images"
    assert notes.records[-1].getMessage() == wanted
    assert any("whose class is that of level 1: 12 of 12" in r.getMessage() for r in notes.records)
    notes.clear()
    make(tree, tokenizer, tmp_path / "out")  # complete
    assert notes.records[-1].getMessage() == wanted
    assert data.main(["inspect", str(tmp_path / "out")]) == 0
    assert lines(capsys)[-1] == wanted
    assert data.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_counts"] == [8, 4]


def test_counts_are_of_what_was_written(tree, tokenizer, tmp_path, notes):  # noqa: F811
    make_folder(tree, {f"dog/x/{i}.png": b"broken" for i in range(2)} | {"eel/0.png": b"broken"})
    (tree / "cat/x/float.tiff").write_bytes(saved((RAMP / 65535).astype(np.float32), "tiff"))
    manifest = make(tree, tokenizer, tmp_path / "out")
    assert manifest.class_counts == [8, 2, 0] and manifest.samples == 10 and len(manifest.skipped) == 4
    assert notes.records[-1].getMessage().endswith("smallest 'eel' with 0 images, largest 'cat' with 8 images")
    [skipped] = [r.getMessage() for r in notes.records if "images skipped" in r.getMessage()]
    assert "unreadable (unknown image format" in skipped and "(3); has floating-point samples, whose black" in skipped
    shards = ShardSet(tmp_path / "out")
    _, found = shards.gather(np.arange(10), np.zeros((10, 1), np.int64))
    assert np.bincount(found, minlength=3).tolist() == manifest.class_counts


def test_one_picture(tokenizer, tmp_path, notes):  # noqa: F811
    make(make_folder(tmp_path / "p", {"cat/0.png": png()}), tokenizer, tmp_path / "out")
    assert notes.records[-1].getMessage() == "1 class (folder level 1, in string order): 'cat' with 1 image"


def test_hidden_files_and_companions_are_told(tokenizer, tmp_path, notes):  # noqa: F811
    files = {"0.png": png(), "0.cls": b"1", "0.json": b"{}", "._0.png": b"side", "._0.cls": b"side"}
    make(make_tar(tmp_path / "w.tar", files), tokenizer, tmp_path / "out")
    text = notes.text
    assert "w.tar: hidden and system files and folders, ignored: 2, for example '._0.png'" in text
    assert "w.tar: companions .json were not read" in text
    assert (
        notes.records[-1].getMessage()
    ) == "2 classes (KEY.cls, numbers): smallest '0' with 0 images, largest '1' with 1 image"


# Sets of older versions ---------------------------------------------------------------------------------------------
def as_older(out: Path) -> None:
    """What versions up to 0.3.0 wrote: neither the source of the classes nor their counts."""
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["class_counts"], manifest["made_by"]["class_source"]
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def unfinished(out: Path) -> None:
    """Turn a set of an older version into one that was stopped before its last shard."""
    manifest = json.loads((out / "manifest.json").read_text())
    (out / ".progress").mkdir()
    plan = {"tokenizer": manifest["tokenizer_sha256"], **{k: manifest[k] for k in ("crops", "layout")}}
    (out / ".progress" / "plan.json").write_text(json.dumps(plan | manifest["made_by"]))
    for info in manifest["shards"][:-1]:
        (out / ".progress" / f"{Path(info['name']).stem}.json").write_text(json.dumps(info | {"skipped": []}))
    (out / manifest["shards"][-1]["name"]).unlink()
    (out / "manifest.json").unlink()


@pytest.mark.parametrize("finished", [True, False])
def test_a_set_with_the_former_classes_is_not_continued_with_others(tree, tokenizer, tmp_path, finished):  # noqa: F811
    """It had the classes x and y, the innermost folders."""
    before = make(tree, tokenizer, tmp_path / "out", choice=Choice(level=-1))
    as_older(tmp_path / "out")
    if not finished:
        unfinished(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"pictures_sha256 .*begun by an older version, .*--class-level -1.*: choose another folder"
    ):
        make(tree, tokenizer, tmp_path / "out")
    after = make(tree, tokenizer, tmp_path / "out", choice=Choice(level=-1))
    assert after.classes == before.classes == ["x", "y"] and after.shards == before.shards


@pytest.mark.parametrize("finished", [True, False])
def test_a_set_whose_classes_are_the_same_is_continued(tokenizer, tmp_path, finished):  # noqa: F811
    tree = make_folder(tmp_path / "tree", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(6)})
    before = make(tree, tokenizer, tmp_path / "out")
    as_older(tmp_path / "out")
    if not finished:
        unfinished(tmp_path / "out")
    after = make(tree, tokenizer, tmp_path / "out")
    assert after.shards == before.shards and after.classes == ["a", "b"]


def test_equal_numbers_of_other_names(tree, tokenizer, tmp_path):  # noqa: F811
    """One class each way, but another name: the manifest would change."""
    one = make_folder(tmp_path / "one", {"top/in/0.png": png()})
    make(one, tokenizer, tmp_path / "out", choice=Choice(level=2))
    with pytest.raises(UserError, match="class_names"):
        make(one, tokenizer, tmp_path / "out", choice=Choice(level=1))


def test_an_older_set_is_inspected(tree, tokenizer, tmp_path, capsys):  # noqa: F811
    make(tree, tokenizer, tmp_path / "out")
    as_older(tmp_path / "out")
    data.main(["inspect", str(tmp_path / "out")])
    start = "2 classes (source not recorded): "
    assert lines(capsys)[-1] == start + "smallest 'dog' with 4 images, largest 'cat' with 8 images"  # from the indexes
    for path in (tmp_path / "out").glob("*.idx"):
        path.write_bytes(path.read_bytes()[:-1])
    m = load_manifest(tmp_path / "out")
    store = FolderStore(tmp_path / "out")
    assert count_classes(store, m) is None
    assert class_summary(store, m).endswith("images per class are not recorded, `megastar data stats` counts them")


@pytest.mark.parametrize(
    "counts", [[8, 4, 0], [8, 5], [13, -1], [8.0, 4], [True, 11], "ab", {}, [2**70, 12 - 2**70], [None, 12]]
)
def test_counts_that_cannot_be(tree, tokenizer, tmp_path, counts):  # noqa: F811
    make(tree, tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_counts": counts}))
    with pytest.raises(UserError, match="manifest.json .*: pretokenize again"):
        load_manifest(tmp_path / "out")


def test_reasons_are_grouped():
    rows = [{"picture": f"a/{i}", "reason": f"a/{i}: 90{i} x 9000 exceeds 40 megapixels"} for i in range(3)]
    rows += [{"picture": "b", "reason": "b: No such file"}, {"reason": "c"}]
    assert reasons_in_words(rows) == "900 x 9000 exceeds 40 megapixels (3); No such file (1); c (1)"
    assert reasons_in_words(rows, most=1) == "900 x 9000 exceeds 40 megapixels (3); other reasons (2)"


# Two splits of one set of classes -----------------------------------------------------------------------------------
def test_validation_shards_with_the_classes_of_the_training_shards(tokenizer, tmp_path):  # noqa: F811
    """A validation split without one of the classes."""
    train = make_folder(tmp_path / "train", {f"{c}/{i}.png": png(i) for c in "abc" for i in range(4)})
    val = make_folder(tmp_path / "val", {f"{c}/{i}.png": png(i) for c in "bc" for i in range(2)})
    make(train, tokenizer, tmp_path / "codes", crops="center-flip")
    make(val, tokenizer, tmp_path / "own", crops="center-flip")
    options = ["--crops", "center-flip", "--device", "cpu", "--tokenizer", str(tokenizer)]
    for names, out in ((tmp_path / "codes", "same"), (tmp_path / "names.txt", "named")):
        (tmp_path / "names.txt").write_text("a\nb\nc\n")
        pretokenize.main([str(val), "--out", str(tmp_path / out), "--classes", str(names), *options])
        assert load_manifest(tmp_path / out).classes == ["a", "b", "c"]
        assert load_manifest(tmp_path / out).class_counts == [0, 2, 2]
    sizes = ["model.vocab_size=32", "model.image_tokens=64", "model.num_classes=3", "train.global_batch=4"]
    cfg = load_config(None, [f"data.shards={tmp_path / 'codes'}", f"data.val_shards={tmp_path / 'own'}", *sizes])
    with pytest.raises(UserError, match="name different classes: .* or one with --classes of the other"):
        open_data(cfg)
    cfg.data.val_shards = str(tmp_path / "same")
    open_data(cfg).close()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "--classes .* does not exist: name a file .* or a set of token shards"), ("a\n\nb\n", "line 2 is blank")],
)
def test_files_of_names_that_are_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        read_class_names(str(tmp_path / "names.txt"), sets=True)


def test_the_options_of_the_command(tokenizer, tmp_path):  # noqa: F811
    tar = make_tar(tmp_path / "w.tar", {"a/0.png": png(), "a/0.json": b'{"y": "ant"}'})
    options = ["--out", str(tmp_path / "out"), "--crops", "center", "--device", "cpu", "--tokenizer", str(tokenizer)]
    with pytest.raises(UserError, match=r".json \(fields y\), which may hold their classes"):
        pretokenize.main([str(tar), *options])
    with pytest.raises(UserError, match="exclude each other"):
        pretokenize.main([str(tar), *options, "--class-level", "1", "--label-field", "y"])
    with pytest.raises(UserError, match="--class-level: '-2' is not an integer from -1 to 100"):
        pretokenize.main([str(tar), *options, "--class-level", "-2"])
    assert not (tmp_path / "out").exists()
    pretokenize.main([str(tar), *options, "--label-field", "y"])
    assert load_manifest(tmp_path / "out").classes == ["ant"]


def test_index_counts_classes(tmp_path, capsys):
    with ShardWriter(tmp_path / "0.tar") as writer:
        for i, label in enumerate((2, 0, 2)):
            writer.add(f"{i}", np.zeros((1, 16), np.int64), label, f"{i}")
    (tmp_path / "._0.tar").write_bytes(b"side")
    data.main(["index", str(tmp_path), "--codebook-size", "8"])
    assert load_manifest(tmp_path).class_counts == [1, 0, 2]
    capsys.readouterr()
    data.main(["inspect", str(tmp_path)])
    wanted = "3 classes (classes of the samples, numbers): smallest '1' with 0 images, largest '2' with 2 images"
    assert lines(capsys)[-1] == wanted
