"""Classes by folders: torchvision's ImageFolder, other levels, and readings that are refused."""

import io
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.data.images.classes import Choice
from megastar.data.images.dataset import ImageSet
from megastar.errors import UserError
from tests.unit.data.images.test_dataset import make_folder, make_tar, png

X = png(7)
TREE = {
    "dog/2.png": X,
    "dog/old/photos/3.png": X,
    "Zebra/0.png": X,
    "cat/old/1.png": X,
    "cat/4.png": X,
    "ant.v2/5.png": X,
    "été/6.png": X,
}


def image_folder(root: Path) -> tuple[list[str], dict[str, int]]:
    """torchvision's documented rule: find_classes, then every image below a class folder has that class."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    labels = {}
    for number, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            for file in sorted(files):
                labels[os.path.relpath(os.path.join(folder, file), root).removesuffix(".png")] = number
    return classes, labels


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_classes_are_those_of_imagefolder(tmp_path, kind):
    tree = make_folder(tmp_path / "f", TREE)
    found = ImageSet(tree if kind == "folder" else make_tar(tmp_path / "p.tar", TREE))
    names, labels = image_folder(tree)
    assert found.class_names == names == ["Zebra", "ant.v2", "cat", "dog", "été"]
    assert {p.key: p.label for p in found} == labels
    assert found.classes.source == "folder level 1, in string order"
    assert (
        found.notes[0]
        == "images in folders below level 1, whose class is that of level 1: 2 of 7 (names at level 2: 1)"
    )


def test_equal_names_in_different_branches(tmp_path):
    """22 top folders with equal names in them were 155 classes, and equal names were one class."""
    files = {f"c{i:02}/{part}/{k}.png": X for i in range(22) for part in ("left", "right", f"x{i}") for k in range(2)}
    found = ImageSet(make_folder(tmp_path, files))
    assert found.class_names == [f"c{i:02}" for i in range(22)]
    assert np.bincount(found.labels).tolist() == [6] * 22
    second = ImageSet(tmp_path, choice=Choice(level=2))
    assert len(second.class_names) == 24
    assert "names in several folders, one class each: 2, for example 'left' of c00/left" in second.notes[-1]


def test_innermost_folders_as_older_versions_read_them(tmp_path):
    found = ImageSet(make_folder(tmp_path, TREE), choice=Choice(level=-1))
    assert found.class_names == sorted(["dog", "photos", "Zebra", "old", "cat", "ant.v2", "été"])
    assert found.classes.source == "innermost folder, in string order"


@pytest.mark.parametrize(
    ("folders", "order", "words"),
    [
        (["0", "1", "2", "10", "100"], ["0", "1", "2", "10", "100"], "in numeric order, because all names are numbers"),
        (["007", "7", "08"], ["007", "7", "08"], "in numeric order, because all names are numbers"),
        (["0", "10", "2", "x"], ["0", "10", "2", "x"], "in string order"),
    ],
)
def test_numbers(tmp_path, folders, order, words):
    found = ImageSet(make_folder(tmp_path, {f"{f}/a.png": X for f in folders}))
    assert found.class_names == order and found.classes.source == f"folder level 1, {words}"


def test_subsets_number_their_classes_alike(tmp_path):
    make_folder(tmp_path, {"train/a/1/0.png": X, "train/c/0.png": X, "val/b/0.png": X, "val/c/x/0.png": X})
    train, val = ImageSet(tmp_path, "train"), ImageSet(tmp_path, "val")
    assert train.class_names == val.class_names == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 2] and val.labels.tolist() == [1, 2]
    assert train.classes.source == "folder level 1 below train, in string order"


def test_one_class_of_all_images(tmp_path):
    make_folder(tmp_path, {"0.png": X, "a/1.png": X})
    found = ImageSet(tmp_path, choice=Choice(level=0))
    assert found.class_names == ["all"] and found.labels.tolist() == [0, 0]


def test_a_single_picture_is_a_set(tmp_path):
    found = ImageSet(make_folder(tmp_path, {"cat/0.png": X}))
    assert found.class_names == ["cat"] and len(found) == 1 and found.read(0).size == (20, 16)


def test_folders_without_images_are_told(tmp_path):
    make_folder(tmp_path, {"a/0.png": X, "b/notes.md": b"", "c/d/0.png": X})
    (tmp_path / "c_empty").mkdir()
    found = ImageSet(tmp_path)
    assert found.class_names == ["a", "c"]
    assert "folders without images, which are no classes: 2, for example 'b'" in found.notes


@pytest.mark.parametrize(
    ("files", "subset", "message"),
    [
        (["train/a/0", "train/b/0", "val/a/0"], None, r"the top folders are splits \(train, val\): use one of them with --subset train with the folders in it as classes, or set --class-level \(1: 2 classes, the top folders; 2: 2 classes"),
        (["Train/0", "Test/0"], None, r"the top folders are splits \(Test, Train\): use one of them with --subset Test, or set --class-level"),
        (["photos/a/0", "photos/b/0"], None, "all images are in the folder 'photos': use the 2 folders in it as classes with --subset photos or --class-level 2, or set --class-level 1 for one class"),
        (["x/y/a/0", "x/y/b/0"], None, "all images are in the folder 'x/y': .* --class-level 3"),
        (["train/in/a/0", "train/in/b/0"], "train", "all images are in the folder 'train/in': .* --subset train/in or --class-level 2"),
        (["0", "1"], None, "no image is in a class folder, the first is '0': .* --class-level 0"),
        (["a/0", "1"], None, r"image '1' is not in a class folder, but other images are \(1 of 2 are not\)"),
    ],
)  # fmt: skip
def test_readings_that_are_refused(tmp_path, files, subset, message):
    make_folder(tmp_path, {f"{f}.png": X for f in files})
    with pytest.raises(UserError, match=message):
        ImageSet(tmp_path, subset)
    unlabelled = ImageSet(tmp_path, subset, choice=None)  # scores and the tokenizer need no classes
    assert len(unlabelled) == len(files) and re.search(message, unlabelled.class_problem)
    assert unlabelled.labels.tolist() == [-1] * len(files) and unlabelled.class_names == []


def test_what_the_sentences_name_works(tmp_path):
    make_folder(tmp_path, {"train/a/0.png": X, "train/b/0.png": X, "val/a/0.png": X})
    assert ImageSet(tmp_path, choice=Choice(level=1)).class_names == ["train", "val"]
    assert ImageSet(tmp_path, choice=Choice(level=2)).class_names == ["a", "b"]
    assert ImageSet(tmp_path, "train").class_names == ["a", "b"]


def test_a_level_that_some_images_lack(tmp_path):
    make_folder(tmp_path, {"a/x/0.png": X, "b/0.png": X})
    with pytest.raises(UserError, match=r"image 'b/0' is not in a folder of level 2, but other images are"):
        ImageSet(tmp_path, choice=Choice(level=2))


def test_given_names_and_order(tmp_path):
    make_folder(tmp_path, {"b/0.png": X, "c/0.png": X})
    found = ImageSet(tmp_path, choice=Choice(names=("c", "a", "b"), names_from="names.txt"))
    assert found.class_names == ["c", "a", "b"] and found.labels.tolist() == [2, 0]
    assert found.classes.source == "folder level 1, names and order of names.txt"
    with pytest.raises(UserError, match="has 1 classes that names.txt does not name, such as 'c': add them"):
        ImageSet(tmp_path, choice=Choice(names=("a", "b"), names_from="names.txt"))
    with pytest.raises(UserError, match="names.txt names the class 'a' twice"):
        Choice(names=("a", "a"), names_from="names.txt")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"level": 101}, "--class-level 101: give 1 for the top folder"),
        ({"level": 1, "field": "cls"}, "--class-level 1 and --label-field cls exclude each other"),
        ({"field": "json"}, "--label-field json: name a field of KEY.json, as json.label"),
    ],
)
def test_choices_that_are_wrong(choice, message):
    with pytest.raises(UserError, match=message):
        Choice(**choice)


# Tars whose names would be classes ------------------------------------------------------------------------------------
def test_shards_are_not_classes(tmp_path):
    for i in range(3):
        make_tar(tmp_path / f"shard-{i:05}.tar", {f"{i}{k}.jpg": X for k in range(2)})
    with pytest.raises(
        UserError, match="have the names of shards, such as 'shard-00000': give --class-level 0 for one"
    ):
        ImageSet(tmp_path)
    assert ImageSet(tmp_path, choice=Choice(level=0)).class_names == ["all"]
    assert ImageSet(tmp_path, choice=Choice(level=1)).class_names == [f"shard-{i:05}" for i in range(3)]


@pytest.mark.parametrize("names", [["n01440764", "n01440765"], ["cats", "dogs"]])
def test_class_tars_are(tmp_path, names):
    for name in names:
        make_tar(tmp_path / f"{name}.tar", {"0.jpg": X})
    assert ImageSet(tmp_path).class_names == names


# Links and folders that cannot be read --------------------------------------------------------------------------------
def test_links(tmp_path):
    make_folder(tmp_path / "p", {"a/0.png": X, "b/0.png": X})
    (tmp_path / "p/a/up").symlink_to(tmp_path / "p", target_is_directory=True)
    (tmp_path / "p/a/gone.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "p/a/self.png").symlink_to(tmp_path / "p/a/self.png")
    os.mkfifo(tmp_path / "p/b/pipe.png")
    found = ImageSet(tmp_path / "p")
    assert [p.key for p in found] == ["a/0", "b/0"]
    notes = "\n".join(found.notes)
    assert "links to a folder above them, not followed: 1, for example 'a/up'" in notes
    assert "links that lead nowhere, ignored: 2, for example 'a/gone.png'" in notes
    assert "pipes, devices and sockets, ignored: 1, for example 'b/pipe.png'" in notes


def test_links_that_multiply(tmp_path):
    """Ten folders with two links each to the next one are a thousand paths."""
    for i in range(12):
        (tmp_path / f"d{i}").mkdir()
        for name in "ab":
            (tmp_path / f"d{i}" / name).symlink_to(tmp_path / f"d{i + 1}", target_is_directory=True)
    make_folder(tmp_path, {"d12/0.png": X})
    with pytest.raises(UserError, match=r"links lead to .* by more than 1000 paths: remove some of them"):
        ImageSet(tmp_path)


def test_a_deep_tree(tmp_path):
    deep = "/".join(["a"] * 1500)
    here = os.open(tmp_path, os.O_RDONLY)
    for part in deep.split("/"):
        os.mkdir(part, dir_fd=here)
        here, before = os.open(part, os.O_RDONLY, dir_fd=here), here
        os.close(before)
    with os.fdopen(os.open("0.png", os.O_CREAT | os.O_WRONLY, dir_fd=here), "wb") as f:
        f.write(X)
    os.close(here)
    try:
        assert ImageSet(tmp_path, choice=Choice(level=1)).class_names == ["a"]
    finally:  # shutil.rmtree of Python 3.11, which pytest uses, is recursive
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a/0.png": X, "b/0.png": X})
    scan = os.scandir

    def refusing(folder):
        if os.fsdecode(folder).endswith("b/"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read everything
    with pytest.raises(
        UserError, match=r"folder .*b.* cannot be read \(Permission denied\): make it readable, or move"
    ):
        ImageSet(tmp_path)


def test_names_of_images_and_of_classes_are_as_written(tmp_path):
    """NFC and NFD spellings are two classes, as for ImageFolder; both are told by the count."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    make_folder(tmp_path, {"\u00e9/0.png": buffer.getvalue(), "e\u0301/0.png": buffer.getvalue()})
    assert ImageSet(tmp_path).class_names == image_folder(tmp_path)[0] == ["e\u0301", "\u00e9"]
