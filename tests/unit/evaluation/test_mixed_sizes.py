"""Images that are not scored at their own size are named: in the log, and in the result, also from the cache."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megastar.cli import main


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, sides in {"same": [32] * 12, "mixed": [32] * 3 + [64] * 8 + [(48, 40)], "real": [64] * 10}.items():
        (tmp_path / name).mkdir()
        for i, side in enumerate(sides):
            width, height = side if isinstance(side, tuple) else (side, side)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.png")
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for path in sorted((tmp_path / "mixed").iterdir()):
            tar.add(path, path.name)
    return tmp_path


def evaluate(folders, made, capfd, monkeypatch):
    monkeypatch.setenv("MEGASTAR_CACHE", str(folders / "cache"))
    words = ["evaluate", str(folders / made), "--real", str(folders / "real"), "--out", str(folders / "s.json")]
    assert main([*words, "--device", "cpu"]) == 0
    return json.loads((folders / "s.json").read_text()), " ".join("".join(capfd.readouterr()).split())


@pytest.mark.parametrize("made", ["mixed", "mixed.tar"])
def test_mixed_sizes_are_named(folders, made, capfd, monkeypatch):
    result, text = evaluate(folders, made, capfd, monkeypatch)
    assert result["generated"]["resized"] == {"64 x 64": 8, "48 x 40": 1} and result["generated"]["size"] == 32
    sentence = (
        "9 of 12 generated images were cropped and resized to 32 x 32 pixels (8 of 64 x 64, 1 of 48 x 40): score images of "
        "one size"
    )
    assert sentence in result["warnings"] and sentence in text


def test_real_images_of_another_size_are_named_also_from_the_cache(folders, capfd, monkeypatch):
    for _ in range(2):
        result, text = evaluate(folders, "same", capfd, monkeypatch)
        assert result["real"]["resized"] == 10 and "resized" not in result["generated"]
        assert "10 of 10 real images were cropped and resized to 32 x 32 pixels" in text


def test_images_of_one_size_need_no_warning(folders, capfd, monkeypatch):
    monkeypatch.setenv("MEGASTAR_CACHE", str(folders / "cache"))
    words = ["evaluate", str(folders / "same"), "--real", str(folders / "same"), "--out", str(folders / "s.json")]
    assert main([*words, "--device", "cpu"]) == 0
    result = json.loads((folders / "s.json").read_text())
    assert "resized" not in result["real"] and not any("resized" in w for w in result["warnings"])
