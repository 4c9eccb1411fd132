"""FDr^k names what `evaluate` names: other sizes, few images, the sampler's record; and it refuses what it would not use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.errors import UserError
from megastar.evaluation.fd_ratio import fd_ratio
from megastar.evaluation.frechet import Statistics, frechet_distance
from megastar.evaluation.options import Settings

FEATURES = "ratio_features:means"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Folders and files of images, and a quick network: the mean of each channel."""
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ratio_features.py").write_text("def means(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    for name, sides in {"made": [16] * 9 + [24] * 3, "held": [24] * 12, "real": [16] * 14, "flat": [16] * 12}.items():
        (tmp_path / name).mkdir()
        images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in sides]
        for i, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.png")
        if len(set(sides)) == 1:
            np.savez(tmp_path / f"{name}.npz", arr_0=np.stack(images))
    return tmp_path


def ratio(sets, made, held, networks=(FEATURES,), **options):
    return fd_ratio(sets / made, sets / "real", sets / held, list(networks), **options)


def distance(sets, made, real="real.npz"):
    """Of the means of the channels, of images that need no resizing."""
    stats = [Statistics().update(np.load(sets / name)["arr_0"].mean((1, 2))) for name in (real, made)]
    return frechet_distance(*stats)


def test_the_ratio_is_that_of_the_distances(sets):
    result = ratio(sets, "flat.npz", "flat")
    assert result["value"] == pytest.approx(1.0) and result["held_out"]["pictures"] == 12
    (row,) = result["networks"].values()
    assert row["generated"] == pytest.approx(distance(sets, "flat.npz"), rel=1e-4)
    page = (Path(__file__).parents[3] / "docs/command_line.md").read_text()
    keys = re.search(r"The object of `evaluate --fdr` has (.*?)\.\n", page, re.DOTALL)
    assert keys and re.findall(r"`(\w+)`", keys[1]) == [*result]


def test_images_of_other_sizes_are_named(sets, caplog):
    result = ratio(sets, "made", "held")
    assert result["generated"]["resized"] == {"24 x 24": 3} and result["held_out"]["resized"] == {"24 x 24": 12}
    told = [
        "3 of 12 generated images were cropped and resized to 16 x 16 pixels (3 of 24 x 24): score images of one size",
        "12 of 12 held-out images were cropped and resized to 16 x 16 pixels (12 of 24 x 24): score images of one size",
    ]
    assert all(sentence in result["warnings"] and sentence in caplog.messages for sentence in told)
    assert not any("resized" in line for line in ratio(sets, "flat", "flat.npz")["warnings"])


def test_too_few_images_are_named_once(sets):
    result = ratio(sets, "flat.npz", "held", settings=Settings(allow_few=True))
    for kind, n in {"generated": 12, "held-out": 12, "real": 14}.items():
        line = f"only {n} {kind} images: below 5000 the distance is biased upward; compare equal counts only"
        assert result["warnings"].count(line) == 1


def test_the_record_of_the_sampler_is_read(sets):
    record = sets / "flat.npz.json"
    record.write_text(json.dumps({"identity": {"count": 12, "cfg_scale": 1.5}, "about": {"label_plan": "balanced"}}))
    result = ratio(sets, "flat.npz", "held", provenance={"command": "c"})
    assert result["provenance"] == {"count": 12, "cfg_scale": 1.5, "label_plan": "balanced", "command": "c"}
    assert result["not_recorded"] == ["weights", "dtype", "seed"]
    assert result["generated"]["size"] == 16 and len(result["generated"]["sha256"]) == 64
    record.write_text(json.dumps({"identity": {"count": 13}, "about": {}}))
    with pytest.raises(UserError, match="records 13 images, but .*flat.npz contains 12: remove the wrong file"):
        ratio(sets, "flat.npz", "held")


@pytest.mark.parametrize("name", ["dinov2", "inception"])
def test_the_file_of_a_network_that_is_not_named_is_refused(sets, name):
    with pytest.raises(UserError, match=f"--{name} file.pth would not be used: --fdr {FEATURES} does not name {name}"):
        ratio(sets, "flat", "held", **{name: "file.pth"})


def test_held_out_images_that_are_the_real_ones_are_refused(sets):
    """Also as copies, and in another format, where rounding may leave a distance above 0."""
    (sets / "copy.npz").write_bytes((sets / "real.npz").read_bytes())
    with pytest.raises(UserError, match="copy.npz has the same contents as .*real.npz: name held-out images"):
        fd_ratio(sets / "flat", sets / "real.npz", sets / "copy.npz", [FEATURES])
    with pytest.raises(UserError, match="real has the same contents as .*real: name held-out images"):
        ratio(sets, "flat", "real")
    pixels = np.load(sets / "real.npz")["arr_0"]
    np.savez(sets / "turned.npz", arr_0=pixels[::-1])
    for other in ("real.npz", "turned.npz"):
        with pytest.raises(
            UserError, match=f"{other} has distance .* from .*: name held-out images, not the real ones"
        ):
            ratio(sets, "flat", other)
    pixels[0] = 255 - pixels[0]  # one other image is enough
    np.savez(sets / "near.npz", arr_0=pixels)
    (row,) = ratio(sets, "flat", "near.npz")["networks"].values()
    assert row["held_out"] == pytest.approx(distance(sets, "near.npz"), rel=1e-4)


def test_a_reference_of_statistics_alone_is_compared_with_held_out_images(sets):
    """Its hash is that of the file."""
    np.savez(sets / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="moments.npz contains only Inception's statistics"):
        fd_ratio(sets / "flat", sets / "moments.npz", sets / "real.npz", [FEATURES])
