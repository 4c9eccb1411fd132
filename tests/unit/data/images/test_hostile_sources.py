"""Hostile tars, lists and labels of images: one sentence, without a hang, and without reading what a header asks for."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from megastar.commands.data import main as data_main
from megastar.data.images.classes import Choice
from megastar.data.images.dataset import ImageSet
from megastar.errors import UserError
from tests.fuzz import byte_variants, json_variants, odd_files

PNG = b"\x89PNG\r\n\x1a\n" + bytes(600)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: dict[str, str]) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT if fields else tarfile.GNU_FORMAT)


def member(name: str, data: bytes = PNG, **fields: dict[str, str]) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


END = bytes(1024)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000000000000000"}
TARS = {
    "sparse map without an end": member("a/s.png", b"x" * 10, pax_headers=SPARSE | {"GNU.sparse.name": "a/s.png"}),
    "negative size": header("a/0.png", -512),
    "size of the header, negative": header("a/0.png", -1024),
    "negative size in an extended header": member("a/0.png", pax_headers={"size": "-1024"}),
    "size of text in an extended header": member("a/0.png", pax_headers={"size": "x"}),
    "long name of negative size": header("././@LongLink", -512, tarfile.GNUTYPE_LONGNAME) + member("a/0.png"),
    "extended header of negative size": header("pax", -512, tarfile.XHDTYPE) + member("a/0.png"),
    "extended header of a gigabyte": header("pax", 1 << 30, tarfile.XHDTYPE),
    "long name of a gigabyte": header("././@LongLink", 1 << 30, tarfile.GNUTYPE_LONGNAME),
    "giant member": header("a/0.png", 2**62),
    "record of length 0": header("pax", 512, tarfile.XHDTYPE) + b"0 x=y\n".ljust(512, b"\0") + member("a/1.png"),
}


def entries(path: Path) -> str:
    """The sentence about a source, "" for one that is read."""
    try:
        list(ImageSet(path))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("label", TARS)
@pytest.mark.parametrize("inner", [False, True])
def test_headers_that_lie(tmp_path, label, inner):
    path, data = tmp_path / "x.tar", member("a/good.png") + TARS[label] + END
    path.write_bytes(member("in.tar", data) + END if inner else data)
    with path.open("ab") as f:  # what a giant header would read is there
        f.truncate(2 << 30)
    tracemalloc.start()
    message = entries(path)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    if "record of length 0" not in label:
        assert f"{path}" in message and message.count("\n") == 0, message


def test_damaged_tars_are_read_or_refused(tmp_path):
    rng, path = random.Random("tars"), tmp_path / "x.tar"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a/" + "long" * 60 + ".png", "a/ü.png", "b/1.png", "b/1.cls"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(PNG), 1.5
            tar.addfile(info, io.BytesIO(PNG))
    whole = out.getvalue()
    for _, data in byte_variants(whole, rng, 400):
        path.write_bytes(data)
        entries(path)  # anything but a UserError fails the test


@pytest.mark.parametrize("kind", odd_files())
def test_what_lies_in_the_place_of_a_label_or_list(tmp_path, kind):
    pictures = tmp_path / "p" / "a"
    pictures.mkdir(parents=True)
    (pictures / "0.png").write_bytes(PNG)
    odd_files()[kind](pictures / "0.cls")
    message = entries(tmp_path / "p")
    assert ".cls" in message and "\n" not in message
    odd_files()[kind](tmp_path / "list.txt")
    message = entries(tmp_path / "list.txt")
    assert message and "\n" not in message


@pytest.mark.parametrize("data", [b"", b"-1", b"9" * 100_000, b"\xff\xfe", b"[/]\x1b[31m", b"1e5"])
def test_labels_that_are_no_classes(tmp_path, data):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / "0.cls").write_bytes(data)
    message = entries(tmp_path)
    assert "0.cls" in message and "\x1b" not in message and len(message) < 400


@pytest.mark.parametrize("data", [b"caf\xe9\n", "a\nb\n".encode("utf-16"), None])
def test_a_file_of_class_names_that_is_not_text(tmp_path, data):
    names = tmp_path / "names.txt"
    names.write_bytes(data or b"")
    if data is None:
        with names.open("ab") as f:
            f.truncate(64 << 30)
    with pytest.raises(UserError, match=r"names\.txt (has \d+ bytes|line 1 is not UTF-8|is UTF-16)"):
        data_main(["index", str(tmp_path), "--codebook-size", "8", "--classes", str(names)])


def test_damaged_companions_are_read_or_refused(tmp_path):
    """A field of KEY.json in a folder and in a tar."""
    rng, whole = random.Random("companions"), {"label": 3, "meta": {"name": "cat", "tags": [1, 2]}}
    variants = [*json_variants(whole, rng, 60), *byte_variants(json.dumps(whole).encode(), rng, 40)]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.png").write_bytes(PNG)
    for i, (_, data) in enumerate(variants):
        choice = Choice(field=("label", "json.meta.name", "meta", "txt")[i % 4])
        (tmp_path / "f" / "0.json").write_bytes(data)
        (tmp_path / "0.tar").write_bytes(member("0.png") + member("0.json", data) + END)
        for path in (tmp_path / "f", tmp_path / "0.tar"):
            try:
                found = ImageSet(path, choice=choice)
                assert len(found.class_names[found[0].label]) <= 200
            except UserError as error:
                message = str(error)
                assert message.count("\n") == 0 and len(message) < 1000 and message.isprintable(), message


def test_damaged_lists_are_read_or_refused(tmp_path):
    rng = random.Random("lists")
    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(PNG)
    for text in ("a.png 0\n'b c.png'\t1\n# end\n".encode(enc) for enc in ("utf-8", "utf-8-sig", "utf-16")):
        for _, data in byte_variants(text, rng, 120):
            (tmp_path / "l.txt").write_bytes(data)
            message = entries(tmp_path / "l.txt")
            assert message.count("\n") == 0 and len(message) < 1000 and message.isprintable(), message
