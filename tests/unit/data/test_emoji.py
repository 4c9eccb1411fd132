"""tools/build_emoji.py: names, splits, bytes, and the tar it made."""

import importlib.util
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "assets" / "emoji64"


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_emoji", ROOT / "tools" / "build_emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emoji(builder, value: int, concept: str, style: str = "noto", group: str = "Food & Drink"):
    return builder.Emoji(np.full((64, 64, 3), value, np.uint8), group, style, concept)


def test_names_and_splits(builder):
    images = [emoji(builder, 0, "Dizzy_Face"), emoji(builder, 1, "dizzy-face"), emoji(builder, 2, "+1", "x")]
    names = builder.member_names(images)
    splits = [builder.split_of(p.concept) for p in images]
    assert names[0] == f"{splits[0]}/food-drink/dizzy-face__noto.webp"
    assert names[2] == f"{splits[2]}/food-drink/+1__x.webp"
    again = builder.member_names([images[0], images[0]])
    assert again[1] == again[0].replace("dizzy-face__", "dizzy-face-2__")
    shares = np.array([builder.split_of(str(i)) for i in range(5000)])
    assert abs((shares == "val").mean() - 0.1) < 0.02 and abs((shares == "test").mean() - 0.1) < 0.02


def test_name_that_a_suffix_would_repeat(builder, monkeypatch):
    images = [emoji(builder, 0, "point_up"), emoji(builder, 1, "point_up"), emoji(builder, 2, "point_up_2")]
    monkeypatch.setattr(builder, "split_of", lambda concept: "train")
    with pytest.raises(ValueError, match="member names repeat"):
        builder.member_names(images)


def test_tar_is_a_function_of_the_images(builder, tmp_path, monkeypatch, capsys):
    images = [emoji(builder, v, f"c{v}") for v in (3, 1, 2)]
    x = np.stack([p.pixels for p in [*images, images[0]]])  # a repeat
    text = {k: np.array([getattr(p, f) for p in [*images, images[0]]]) for k, f in (("y", "group"), ("s", "style"))}
    np.savez(tmp_path / "x.npz", x=x, n=np.array(["c3", "c1", "c2", "other"]), sc=text["y"], **text)
    for out in ("a.tar", "b.tar"):
        arguments = ["build_emoji.py", "--npz", str(tmp_path / "x.npz"), "--out", str(tmp_path / out), "--workers", "1"]
        monkeypatch.setattr("sys.argv", arguments)
        builder.main()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert "3 images (train" in capsys.readouterr().out
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == sorted(tar.getnames()) and len(tar.getnames()) == 3
    monkeypatch.setattr(builder, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="more than the limit of 1,000: nothing was written"):
        builder.write_tar(["a"], [b"x"], tmp_path / "c.tar")
    assert not list(tmp_path.glob("c.tar*"))


def test_missing_and_other_packages(builder, tmp_path):
    with pytest.raises(SystemExit, match="is missing: npm install --prefix .* @iconify-json/noto@1.2.9"):
        builder.package_folder(tmp_path, "@iconify-json/noto", "1.2.9")
    folder = tmp_path / "node_modules" / "@iconify-json" / "noto"
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": "2.0.0"}))
    with pytest.raises(SystemExit, match="is version 2.0.0, expected 1.2.9"):
        builder.package_folder(tmp_path, "@iconify-json/noto", "1.2.9")


def test_shipped_tar_and_its_licences(builder):
    assert (ASSETS / "emoji64.tar").stat().st_size <= builder.MAX_BYTES
    readme = (ASSETS / "README.md").read_text()
    for style, (name, version) in {**builder.VECTOR_PACKS, "fluent3d": builder.RASTER_PACK}.items():
        assert re.search(rf"\| `{style}` \|.*`{re.escape(name)}` {re.escape(version)} \| \[(.+?)\]", readme), style
    for link in re.findall(r"\((LICENSES/[^)]+)\)", readme):
        assert (ASSETS / link).stat().st_size > 900
