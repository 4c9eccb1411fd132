"""Classes in companions of WebDataset images, and what is refused rather than guessed; hidden files in every source."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megastar.data.images.classes import Choice
from megastar.data.images.dataset import ImageSet
from megastar.data.images.listing import Listing
from megastar.errors import UserError
from tests.fuzz import DEEP
from tests.unit.data.images.test_dataset import make_folder, make_tar, png

X = png(7)
SIDE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(120)  # of macOS' AppleDouble format


def source(kind: str, at: Path, files: dict[str, bytes]) -> Path:
    return make_folder(at / "f", files) if kind == "folder" else make_tar(at / "w.tar", files)


def labels(path: Path, **choice) -> list[str]:
    found = ImageSet(path, choice=Choice(**choice))
    return [found.class_names[i] for i in found.labels]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("suffix", ["cls", "CLS", "label", "Label", "index", "INDEX"])
def test_usual_companions_in_any_letter_case(tmp_path, kind, suffix):
    files = {"a.JPG": X, f"a.{suffix}": b"2\n", "b.jpg": X, f"b.{suffix}": b"\xef\xbb\xbf0\r\n"}
    found = ImageSet(source(kind, tmp_path, files))
    assert found.labels.tolist() == [2, 0] and found.class_names == ["0", "1", "2"]
    assert found.classes.source == f"KEY.{suffix.lower()}, numbers" and found.notes == []


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("field", ["label", "json.label", "json.meta.id"])
def test_fields_of_json(tmp_path, kind, field):
    files = {"a.jpg": X, "b.jpg": X, "c.jpg": X}
    for key, number, name in (("a", 3, "tench"), ("b", 0, "ant"), ("c", 3, "tench")):
        files[f"{key}.json"] = json.dumps({"label": name, "meta": {"id": number}}).encode()
    path = source(kind, tmp_path, files)
    with pytest.raises(
        UserError, match=r"images with .json \(fields label, meta\), which may hold their classes: .* json.label"
    ):
        ImageSet(path)
    found = ImageSet(path, choice=Choice(field=field))
    if field == "json.meta.id":
        assert found.class_names == ["0", "1", "2", "3"] and found.labels.tolist() == [3, 0, 3]
        assert found.classes.source == "field 'meta.id' of KEY.json, numbers"
    else:
        assert found.class_names == ["ant", "tench"] and found.labels.tolist() == [1, 0, 1]
        assert found.classes.source == "field 'label' of KEY.json, in string order"


def test_cls_beside_other_companions(tmp_path):
    """As in the usual ImageNet shards: the class is in .cls; what was not read is told."""
    make_tar(tmp_path / "0.tar", {"a.jpg": X, "a.cls": b"1", "a.json": b'{"w": 1}', "a.txt": b"a fish"})
    found = ImageSet(tmp_path)
    assert found.labels.tolist() == [1] and found.notes == ["companions .json, .txt were not read"]


@pytest.mark.parametrize(
    ("files", "choice", "message"),
    [
        ({"a.cls": b"1", "a.index": b"2"}, {}, "images with .cls and .index: choose the class with --label-field cls or index"),
        ({"a.txt": b"fish"}, {}, "images with .txt, which may hold their classes: choose with --label-field .as txt., or --class-level 1"),
        ({"a.class": b"fish", "a.json": b"{}"}, {}, "images with .class and .json, which may hold"),
        ({"a.json": b'{"x": 1}'}, {"field": "label"}, r"--label-field label: no image of .* has such a companion or field, but .json \(fields x\)"),
        ({}, {"field": "cls"}, "--label-field cls: no image of .* has such a companion or field$"),
        ({"a.label": b"1", "a.json": b'{"label": 2}'}, {"field": "label"}, "has both json.label and label: give .label for the companion, json.label for the field"),
        ({"a.json": b'{"y": 1}', "c/b.jpg": X, "c/b.json": b'{"x": 1}'}, {"field": "y"}, "1 of 2 images have no field 'y' of KEY.json, the first is 'c/b': label all or none"),
        ({"a.json": b'{"y": [1, 2]}'}, {"field": "y"}, "a.json: y holds a list of 2: a class is an integer from 0 to 999999, or a name"),
        ({"a.json": b'{"y": true}'}, {"field": "y"}, "a.json: y holds True: a class is an integer"),
        ({"a.json": b'{"y": -1}'}, {"field": "y"}, "a.json: y holds -1: a class"),
        ({"a.json": b'{"y": 1.5}'}, {"field": "y"}, "a.json: y holds 1.5: a class"),
        ({"a.json": b'{"y": "\\ud800"}'}, {"field": "y"}, "a.json: y holds .* which is not a class"),
        ({"a.json": b'{"y": "\\u001b[31m"}'}, {"field": "y"}, "a.json: y holds .* which is not a class"),
        ({"a.json": b"[1]"}, {"field": "y"}, "a.json holds a list of 1, not an object with fields"),
        ({"a.json": DEEP.encode()}, {"field": "y"}, "a.json is not JSON"),
        ({"a.json": b" " * (2 << 20)}, {"field": "y"}, "a.json has 2097152 bytes, more than the limit"),
        ({"a.cls": b"1_0"}, {}, "a.cls holds b'1_0': write an integer class"),
        ({"a.cls": "\u0661".encode()}, {}, "a.cls holds .*: write an integer class"),
        ({"a.label": b""}, {}, "a.label holds '', which is not a class"),
        ({"a.label": b"x" * 5000}, {}, "a.label has more than 1024 bytes and cannot be a class"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_no_guess(tmp_path, kind, files, choice, message):
    path = source(kind, tmp_path, {"a.jpg": X, **files})
    with pytest.raises(UserError, match=message) as error:
        ImageSet(path, choice=Choice(**choice))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_the_options_that_the_sentences_name(tmp_path):
    files = {"c/a.jpg": X, "c/a.cls": b"1", "c/a.index": b"2", "c/a.txt": b"fish\n", "c/a.label": b"3"}
    path = make_tar(tmp_path / "w.tar", files | {"c/a.json": b'{"label": 4}'})
    assert labels(path, field="cls") == ["1"] and labels(path, field=".CLS") == ["1"]
    assert labels(path, field="index") == ["2"] and labels(path, field="txt") == ["fish"]
    assert labels(path, field=".label") == ["3"] and labels(path, field="json.label") == ["4"]
    assert labels(path, level=1) == ["c"]
    assert "the classes in cls and index and label were not used, because --class-level is set" in (
        ImageSet(path, choice=Choice(level=1)).notes
    )


def test_names_and_numbers_of_companions(tmp_path):
    path = make_tar(tmp_path / "w.tar", {"a.jpg": X, "a.label": b"10", "b.jpg": X, "b.label": b"cat"})
    found = ImageSet(path)
    assert found.class_names == ["10", "cat"]
    assert "classes are names, among them 'cat' and the number '10'" in found.notes


def test_names_for_numbers(tmp_path):
    path = make_tar(tmp_path / "w.tar", {"a.jpg": X, "a.cls": b"1"})
    assert labels(path, names=("ant", "bee"), names_from="names.txt") == ["bee"]
    with pytest.raises(UserError, match="has class 1, but names.txt names 1 classes, 0 to 0: add names"):
        labels(path, names=("ant",), names_from="names.txt")


def test_a_listing_is_of_one_label_field(tmp_path):
    path, cache = make_tar(tmp_path / "w.tar", {"a.jpg": X, "a.cls": b"1", "a.txt": b"fish"}), tmp_path / "l.npz"
    for field, name in (("cls", "1"), ("txt", "fish"), ("txt", "fish")):
        found = ImageSet(path, choice=Choice(field=field), cache=cache)
        assert found.class_names[found[0].label] == name and Listing.load(cache).findings.label_field == field


# Hidden files -------------------------------------------------------------------------------------------------------
HIDDEN = {
    "a/._0.png": SIDE,
    "a/.DS_Store": b"x",
    "._b": SIDE,
    "__MACOSX/a/._0.png": SIDE,
    "a/.ipynb_checkpoints/0-checkpoint.png": X,
    ".hidden/0.png": X,
    "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.png": X,
    "b/.1.png": X,
}
SHOWN = {"a/0.png": X, "b/1.png": X}


@pytest.mark.parametrize("kind", ["folder", "tar", "dotted tar"])
def test_hidden_files_are_ignored_and_counted(tmp_path, kind):
    files = HIDDEN | SHOWN
    if kind == "dotted tar":
        files = {f"./{name}": data for name, data in files.items()}
    found = ImageSet(source(kind, tmp_path, files))
    assert [p.key for p in found] == ["a/0", "b/1"] and found.class_names == ["a", "b"]
    assert len(found.notes) == 1 and found.notes[0].startswith("hidden and system files and folders, ignored: 8, for")
    assert found.digest() == ImageSet(make_folder(tmp_path / "plain", SHOWN)).digest()


def test_macos_side_files_in_webdataset_tars(tmp_path):
    files = {}
    for i in range(6):
        files |= {
            f"./._{i:03}.cls": SIDE,
            f"./{i:03}.cls": b"%d" % (i % 2),
            f"./._{i:03}.png": SIDE,
            f"./{i:03}.png": X,
        }
    make_tar(tmp_path / "w.tar", files)
    (tmp_path / "._w.tar").write_bytes(SIDE)
    found = ImageSet(tmp_path)
    assert found.labels.tolist() == [0, 1] * 3
    assert "hidden and system files and folders, ignored: 13," in found.notes[0]


def test_a_source_in_a_hidden_folder(tmp_path):
    """Only what is hidden below the source is ignored."""
    assert len(ImageSet(make_folder(tmp_path / ".cache" / "images", SHOWN))) == 2
    (tmp_path / ".cache" / "l.txt").write_text("images/a/0.png\timages\n../.cache/images/b/1.png\timages\n")
    assert len(ImageSet(tmp_path / ".cache" / "l.txt")) == 2


def test_only_hidden_files(tmp_path):
    with pytest.raises(UserError, match="no images in .*; hidden and system files and folders, ignored: 1, for"):
        ImageSet(make_folder(tmp_path, {"._0.png": SIDE}))


# Several of one kind --------------------------------------------------------------------------------------------------
def test_a_member_that_occurs_twice_is_the_last_one(tmp_path):
    """As when the tar is extracted."""
    make_tar(tmp_path / "w.tar", {"a/0.png": png(1), "a/1.png": png(2)})
    with tarfile.open(tmp_path / "w.tar", "a") as tar:
        tar.add(make_folder(tmp_path / "new", {"0.png": png(9)}) / "0.png", "a/0.png")
    found = ImageSet(tmp_path / "w.tar")
    assert [int(np.asarray(found.read(i))[0, 0, 0]) for i in range(len(found))] == [9, 2]
    assert found.notes == ["members of tars that a later member of their name replaces: 1, for example 'a/0.png'"]


def test_other_archives_and_tars_are_told(tmp_path):
    folder = make_folder(tmp_path / "f", {"a/0.png": X, "a/rest.zip": b"PK", "b/more.tar.gz": b"", "b/1.png": X})
    make_tar(folder / "a" / "deep.tar", {"0.png": X})
    notes = "\n".join(ImageSet(folder).notes)
    assert "compressed archives, not read (unpack them): 2, for example 'a/rest.zip'" in notes
    assert "tars, not read because there are images outside them: 1, for example 'a/deep.tar'" in notes
    make_tar(folder / "top.tar", {"c/0.png": X})
    found = ImageSet(folder)
    assert found.class_names == ["c"]
    notes = "\n".join(found.notes)
    assert "images outside the tars, not read: 2, for example 'a/0.png'" in notes
    assert "tars in deeper folders, not read: 1, for example 'a/deep.tar'" in notes


def test_a_zip_is_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="images.zip is compressed and cannot be read by position: unpack it first"):
        ImageSet(tmp_path / "images.zip")
