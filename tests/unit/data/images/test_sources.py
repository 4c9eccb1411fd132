"""Sources: the same images give the same keys, classes and pixels, however they are packed."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megastar.data.images.dataset import ImageSet
from megastar.data.images.listing import Listing
from megastar.errors import UserError
from tests.unit.data.images.test_dataset import make_folder, make_tar, png

PICTURES = {f"n{c:08d}/n{c:08d}_{i}.JPEG": png(10 * c + i) for c in (3, 1, 2) for i in range(4)}
CLASSES = ["n00000001", "n00000002", "n00000003"]


def class_tars(folder: Path) -> Path:
    folder.mkdir()
    for name in CLASSES:
        make_tar(folder / f"{name}.tar", {k.split("/")[1]: v for k, v in PICTURES.items() if k.startswith(name)})
    return folder


def write_source(kind: str, at: Path) -> Path:
    """PICTURES as ``kind`` below ``at``."""
    if kind == "tree":
        return make_folder(at / "tree", PICTURES)
    if kind == "links":  # ImageNet's classes are often links into another disk
        make_folder(at / "disk", PICTURES)
        (at / "links").mkdir()
        for name in CLASSES:
            (at / "links" / name).symlink_to(at / "disk" / name, target_is_directory=True)
        (at / "disk" / CLASSES[0] / "loop").symlink_to(at / "disk" / CLASSES[0], target_is_directory=True)
        return at / "links"
    if kind == "tar":
        return make_tar(at / "all.tar", {f"./{k}": v for k, v in PICTURES.items()})
    if kind == "class tars":
        return class_tars(at / "tars")
    if kind == "nested":  # ILSVRC2012_img_train.tar
        tars = class_tars(at / "tars")
        return make_tar(at / "train.tar", {p.name: p.read_bytes() for p in tars.iterdir()})
    assert kind == "list"
    make_folder(at, PICTURES)
    (at / "list.txt").write_text("# images\n\n" + "".join(f"{k}\n" for k in PICTURES))
    return at / "list.txt"


def look(source: Path, **options) -> list[tuple[str, str, int]]:
    """(key, class, a pixel) of every image."""
    s = ImageSet(source, **options)
    assert len(s) == len(list(s))
    return [(p.key, s.class_names[p.label], int(np.asarray(s.read(i))[0, 0, 0])) for i, p in enumerate(s)]


EXPECTED = sorted((k.removesuffix(".JPEG"), k.split("/")[0], 10 * int(k[8]) + int(k[-6])) for k in PICTURES)


@pytest.mark.parametrize("kind", ["tree", "links", "tar", "class tars", "nested", "list"])
def test_the_same_images_from_every_source(tmp_path, kind):
    source = write_source(kind, tmp_path)
    assert look(source) == EXPECTED
    assert ImageSet(source).class_names == CLASSES  # sorted, as ImageFolder does
    tree = make_folder(tmp_path / "again", PICTURES)
    assert ImageSet(source).digest() == ImageSet(tree).digest()


def test_class_tars_below_subsets(tmp_path):
    (tmp_path / "root").mkdir()
    class_tars(tmp_path / "root" / "train")
    source = make_folder(tmp_path / "root", {})
    found = ImageSet(source, "train")
    assert found.class_names == CLASSES and len(found) == 12 and found[0].key.startswith("train/n00000001/")
    with pytest.raises(UserError, match=r"no images in .* \(subset 'val'\)"):
        ImageSet(source, "val")


def test_a_tar_of_webdataset_tars(tmp_path):
    inner = make_tar(tmp_path / "i.tar", {"a.jpg": png(5), "a.cls": b"3", "sub/b.jpg": png(6), "sub/b.cls": b"1"})
    make_tar(tmp_path / "o.tar", {"shard.tar": inner.read_bytes()})
    assert look(tmp_path / "o.tar") == [("a", "3", 5), ("sub/b", "1", 6)]


# Lists -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "names", "labels"),
    [
        ("a b.png\tzebra\n./c.png\tant", ["ant", "zebra"], [1, 0]),
        ("c.png zebra\nd.png ant", ["ant", "zebra"], [1, 0]),
        ("c.png 2\nd.png 0", ["0", "1", "2"], [2, 0]),  # numbers are the classes, as in a .cls
    ],
)
def test_lists(tmp_path, lines, names, labels):
    make_folder(tmp_path, {"a b.png": png(1), "c.png": png(2), "d.png": png(3)})
    (tmp_path / "val.tsv").write_text(lines)
    found = ImageSet(tmp_path / "val.tsv")
    assert found.class_names == names and [p.label for p in found] == labels
    assert found.read(0).size == (20, 16)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "a.png 1\nb.png",
            "1 of 2 lines have no class, the first is 'b.png' .line 2.: give a class on every line or on none",
        ),
        ("a.png 1\nreadme", "val.txt, line 2: 'readme' is not an image path with or without a class"),
        ("\tcat", "val.txt, line 1: '.tcat' is not an image path"),
        ("a.png 1000000", "val.txt, line 1, holds b'1000000': write an integer class from 0 to 999999"),
        ("", "no images in"),
    ],
)
def test_wrong_lists(tmp_path, lines, message):
    (tmp_path / "val.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        ImageSet(tmp_path / "val.txt")


# Tars --------------------------------------------------------------------------------------------------------------
def test_a_broken_inner_tar_is_named(tmp_path):
    tars = class_tars(tmp_path / "tars")
    whole = (tars / "n00000002.tar").read_bytes()
    with tarfile.open(tars / "n00000002.tar") as tar:
        cut = [m.offset for m in tar][2]
    files = {p.name: p.read_bytes() for p in sorted(tars.iterdir())} | {"n00000002.tar": whole[:cut]}
    make_tar(tmp_path / "train.tar", files)
    with pytest.raises(UserError, match=r"train.tar:n00000002.tar is broken or truncated at byte \d+, after 2 images"):
        ImageSet(tmp_path / "train.tar")


def test_other_members_are_passed_over(tmp_path):
    """Long names (GNU and pax), links, folders."""
    long = "n00000001/" + "x" * 150 + ".jpg"
    for i, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{i}.tar", "w", format=form) as tar:
            folder = tarfile.TarInfo("n00000001")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo("n00000001/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            member = tarfile.TarInfo(long)
            member.size = len(png(7))
            tar.addfile(member, io.BytesIO(png(7)))
        assert look(tmp_path / f"{i}.tar") == [(long.removesuffix(".jpg"), "n00000001", 7)]


def test_a_tar_that_was_cut_after_it_was_listed(tmp_path):
    source = write_source("tar", tmp_path)
    found = ImageSet(source)
    os.truncate(source, found[3].offset + 10)
    with pytest.raises(UserError, match="all.tar ends inside n.*: it was truncated after it was listed"):
        [found.read(i) for i in range(12)]


# The listing's file ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tree", "tar", "class tars", "nested", "list"])
def test_a_listing_is_used_while_the_source_is_the_same(tmp_path, kind, monkeypatch):
    source, cache = write_source(kind, tmp_path), tmp_path / "cache" / "pictures.npz"
    cache.parent.mkdir()
    first = look(source, cache=cache)
    with monkeypatch.context() as m:
        m.setattr("megastar.data.images.sources.list_source", None)
        assert look(source, cache=cache) == first
    file = source if source.is_file() else next(source.iterdir())
    os.utime(file, ns=(1, 1))  # as a new tar, list or folder would have another time
    again: list[int] = []
    found = ImageSet(source, cache=cache, report=again.append)
    assert again or kind == "list"
    assert len(found) == 12
    cache.write_bytes(cache.read_bytes()[:-30])
    assert Listing.load(cache) is None and look(source, cache=cache) == first


def test_images_are_counted_while_a_tar_is_listed(tmp_path, monkeypatch):
    """Also in one large tar, and of several at once in total."""
    monkeypatch.setattr("megastar.data.images.tars._COUNTED", 2)
    told: list[int] = []
    source = write_source("tar", tmp_path)
    ImageSet(source, report=told.append)
    assert told[0] == 0 and set(range(2, 13, 2)) <= set(told) and told[-1] == 12
    told.clear()
    (tmp_path / "more").mkdir()
    ImageSet(write_source("class tars", tmp_path / "more"), report=told.append)
    assert max(told) == told[-1] == 12 and len(set(told)) > 3


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path / "cat")
    os.mkdir(folder)
    for name, value in ((b"\xff.png", 1), ("ä.png".encode(), 2)):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(png(value))
    assert look(tmp_path) == [("cat/ä", "cat", 2), ("cat/\\xff", "cat", 1)]
