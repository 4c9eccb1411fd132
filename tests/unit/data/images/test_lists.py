"""Lists of images as people and programs write them."""

import codecs

import pytest

from megastar.data.images.classes import Choice
from megastar.data.images.dataset import ImageSet
from megastar.errors import UserError
from tests.unit.data.images.test_dataset import make_folder, png

X = png(7)
FILES = {"a.png": X, "b c.png": X, "sub dir/ü.png": X, "x,y.png": X, "cat/0.png": X, "dog/1.png": X}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "d", FILES)


def look(folder, data: bytes | str, name: str = "l.txt", **choice) -> list[tuple[str, str]]:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    found = ImageSet(folder / name, choice=Choice(**choice))
    for i in range(len(found)):
        found.read(i)
    return [(p.key, found.class_names[p.label]) for p in found]


PLAIN = "a.png\tant\nb c.png\tbee\nsub dir/ü.png\tant\n"
AS_READ = [("a", "ant"), ("b c", "bee"), ("sub dir/ü", "ant")]


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),  # of old programs for the Macintosh
        codecs.BOM_UTF8 + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode("utf-16"),
        codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
        ("\n# a comment\n   \n" + PLAIN + "\n\n#end").encode(),
        PLAIN.replace("\t", " ").encode(),
        b"\"a.png\"\tant\n'b c.png' bee\n" + '"sub dir/ü.png"   ant'.encode(),
        PLAIN.replace("a.png", "./sub dir/../a.png", 1).encode(),
        ("  a.png\t ant \n b c.png\tbee\nsub dir/ü.png\tant").encode(),
    ],
    ids=["plain", "CRLF", "CR", "BOM", "UTF-16", "UTF-16-BE", "comments", "spaces", "quoted", "dots", "indented"],
)
def test_ways_to_write_a_list(folder, data):
    assert look(folder, data) == AS_READ


@pytest.mark.parametrize("digit", ["²", "٣", "３", "৪"])
def test_digits_of_other_scripts_are_names(folder, digit):
    assert look(folder, f"a.png {digit}\nb c.png\t{digit}\n") == [("a", digit), ("b c", digit)]
    assert look(folder, f"a.png {digit}\nb c.png\t7\n") == [("a", digit), ("b c", "7")]
    assert look(folder, f"a.png {digit}.5\nb c.png\t{digit}\n") == [("a", f"{digit}.5"), ("b c", digit)]
    assert ImageSet(folder / "l.txt").classes.source == "list file, in string order"


def test_where_its_classes_are_from(folder):
    (folder / "n.LST").write_text("a.png 3\nb c.png 10\n")
    found = ImageSet(folder / "n.LST")
    assert found.classes.source == "list file, numbers" and found.labels.tolist() == [3, 10]
    assert look(folder, "cat/0.png\ndog/1.png\n") == [("cat/0", "cat"), ("dog/1", "dog")]
    assert ImageSet(folder / "l.txt").classes.source == "folder level 1, in string order"


def test_paths_are_relative_to_the_list(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))  # beside the working directory, not beside the list
    assert look(folder, "a.png\tant\n") == [("a", "ant")]
    assert int(ImageSet(folder / "l.txt").read(0).getpixel((0, 0))[0]) == 7
    absolute = look(folder, f"{folder}/a.png\tant\n../d/b c.png\tbee\n")
    assert [name for _, name in absolute] == ["bee", "ant"]


def test_folders_outside_the_list_are_no_classes_by_themselves(folder):
    lines = f"{folder}/cat/0.png\n../d/dog/1.png\n"
    with pytest.raises(
        UserError, match=r"l.txt, line 1: .*cat/0.png is not below the list's folder, so its top folder"
    ):
        look(folder, lines)
    assert sorted(name for _, name in look(folder, lines, level=-1)) == ["cat", "dog"]


def test_repeated_lines(folder):
    assert look(folder, "a.png 0\n./a.png 0\nb c.png 1\n") == [("a", "0"), ("b c", "1")]
    notes = ImageSet(folder / "l.txt").notes
    assert notes == ["lines of the list that repeat an image and its class, ignored: 1, for example 'a.png, line 2'"]


def test_side_files_of_find(folder):
    (folder / "._a.png").write_bytes(b"side")
    assert look(folder, "a.png 0\n._a.png 0\n__MACOSX/a.png 0\n") == [("a", "0")]
    assert "hidden and system files and folders, ignored: 2" in ImageSet(folder / "l.txt").notes[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.png 0\n\ngone.png 1\nalso.png 1\n", r"l.txt, line 3: gone.png does not exist \(2 of 3 images are missing\): paths are relative to "),
        ("0 a.png\n1 b c.png\n", r"l.txt, line 1: 0 a.png does not exist .*: write the class '0' after the path, path<TAB>class"),
        ("a.png 0\n\na.png 1\n", "l.txt, line 3: 'a.png' has class '1', but '0' on line 1: give it one class"),
        ("a.png -1\nb c.png -1\n", "l.txt, line 1: class '-1' is not an integer from 0: write such integers, or names, or leave out"),
        ("a.png 0\nb c.png 1.0\n", "l.txt, line 2: class '1.0' is not an integer from 0"),
        ("path label\na.png 0\n", "l.txt, line 1: 'path label' is not an image path"),
        ("a.png,0\n", "l.txt, line 1: 'a.png,0' is not an image path"),
        (b"a.png\tb\xc3\x28\x07\n", "l.txt, line 1, holds .*, which is not a class"),
        ("a.png\tx".encode("utf-16-le"), "l.txt contains NUL bytes, so it is not text, or UTF-16 without its mark: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a\0.\0p", "l.txt begins as UTF-16 text but is not .*: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"\0\xd8\0\xd8", "l.txt begins as UTF-16 text but is not"),
        ("# only a comment\n", "no images in"),
        ("a.png " + "x" * 1000, "l.txt, line 1, holds .* which is not a class: write a number, or a name of 1 to 200"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(folder, data, message):
    with pytest.raises(UserError, match=message) as error:
        look(folder, data)
    assert "\n" not in str(error.value) and "\x07" not in str(error.value)


def test_a_label_field_of_a_list(folder):
    with pytest.raises(UserError, match=r"--label-field cls: the list .*l.txt has the classes itself: omit the option"):
        look(folder, "a.png 0\n", field="cls")
