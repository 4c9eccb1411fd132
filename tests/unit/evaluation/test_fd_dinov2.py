"""FD-DINOv2: Pillow's resize, class tokens, the distance, and its name, against plain operations."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from megastar.cli import main
from megastar.errors import UserError
from megastar.evaluation.features import DinoFeatures, open_network, resize_pillow
from megastar.evaluation.scores import choose_metrics
from tests.unit.encoders.test_dinov2 import random_state, reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("dinov2") / "w.pth"
    torch.save(random_state(dim=64, blocks=2, grid=16), file)
    return file


def pictures(n: int, side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def features_of(images: np.ndarray) -> np.ndarray:
    """Class tokens in float64: each image resized by Pillow, as torchvision's Resize of a PIL image does."""
    resized = [np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in images]
    batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).double() / 255
    return reference(random_state(dim=64, blocks=2, grid=16), batch)[0].numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), the root's trace from the eigenvalues of A B."""
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(A @ B).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * roots)


def test_the_command_computes_it(weights, tmp_path):
    made, real = pictures(70, 24, 0), pictures(80, 24, 1) // 2
    for name, images in (("made", made), ("real", real)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    words = ["evaluate", str(tmp_path / "made.npz"), "--real", str(tmp_path / "real.npz"), "--dinov2", str(weights)]
    assert main([*words, "--metrics", "fd_dinov2", "--out", str(tmp_path / "s.json"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert list(result["scores"]) == [f"FD-DINOv2-vit64x2p14@{digest[:8]}"]
    assert result["value"] == pytest.approx(frechet(features_of(made), features_of(real)), rel=1e-4)
    assert result["features"]["weights_sha256"] == digest and not result["features"]["published_vitl14"]
    assert result["floor"] > 0 and any("papers use 50000" in w for w in result["warnings"])


def test_images_of_224_pixels_are_not_resized():
    images = torch.from_numpy(pictures(2, 224, 0))
    assert resize_pillow(images, 224) is images


def test_too_few_images_are_refused(weights, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=pictures(64, 16, 0))
    words = ["evaluate", str(tmp_path / "a.npz"), "--real", str(tmp_path / "a.npz"), "--dinov2", str(weights)]
    assert main(words) == 2
    assert "64 images, but fd_dinov2 requires 65" in capsys.readouterr().err


def test_choices_that_do_not_fit_are_refused(weights, capsys, tmp_path):
    network = DinoFeatures(weights)
    assert choose_metrics(None, network) == ("fd_dinov2",)
    with pytest.raises(UserError, match="'fid' is not available with these features: use fd_dinov2, kid, pr"):
        choose_metrics(["fid"], network)
    with pytest.raises(UserError, match="fd_dinov2 requires --dinov2 FILE"):
        choose_metrics(["fd_dinov2"], open_network("efflite0"))
    with pytest.raises(UserError, match="FD-DINOv2 requires --dinov2 FILE: download dinov2_vitl14"):
        open_network("dinov2")
    with pytest.raises(UserError, match="select different networks"):
        open_network(inception="a.pth", dinov2="b.pth")
    with pytest.raises(UserError, match="--dinov2 none.pth does not exist"):
        open_network(dinov2="none.pth")
    np.savez(tmp_path / "a.npz", arr_0=pictures(70, 16, 0))
    for words, sentence in (
        (["--metrics", "fd_dinov2"], "FD-DINOv2 requires --dinov2 FILE"),
        (["--dinov2", str(weights), "--inception", "x.pth"], "select different networks"),
        (["--dinov2", str(weights), "--features", "a:b"], "select different networks"),
    ):
        assert main(["evaluate", str(tmp_path / "a.npz"), "--real", str(tmp_path / "a.npz"), *words]) == 2
        assert sentence in capsys.readouterr().err


def test_fd_ratio_is_the_mean_over_networks(weights, tmp_path, monkeypatch, capsys):
    """DINOv2 against the reference; EfficientNet-Lite0 against the scores of `evaluate`."""
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    sets = {"made": pictures(70, 24, 0), "real": pictures(80, 24, 1) // 2, "held": pictures(70, 24, 2) // 2 + 9}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    made, real, held, out = (str(tmp_path / f"{n}") for n in ("made.npz", "real.npz", "held.npz", "r.json"))
    words = ["evaluate", made, "--real", real, "--out", out, "--device", "cpu"]
    assert main([*words, "--fdr", "dinov2,efflite0", "--held-out", held, "--dinov2", str(weights)]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    dino, lite = result["networks"].values()
    features = {name: features_of(images) for name, images in sets.items()}
    wanted = frechet(features["made"], features["real"]) / frechet(features["held"], features["real"])
    assert dino["ratio"] == pytest.approx(wanted, rel=1e-4)
    for name, key in ((made, "generated"), (held, "held_out")):
        assert main(["evaluate", name, *words[2:], "--allow-few"]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["value"] == pytest.approx(lite[key], rel=1e-6)
    assert result["metric"] == "FDr^2" and result["value"] == pytest.approx((dino["ratio"] + lite["ratio"]) / 2)
    few = str(tmp_path / "few.npz")
    np.savez(few, arr_0=sets["held"][:5])
    assert main([*words, "--fdr", "dinov2", "--held-out", few, "--dinov2", str(weights), "--allow-few"]) == 0
    told = json.loads((tmp_path / "r.json").read_text())["warnings"]
    least = features["held"].shape[1] + 1
    assert told.count(f"fd_dinov2 is meaningful only with {least} or more images") == 1
    capsys.readouterr()
    for more, sentence in (
        (["--fdr", "efflite0"], "--fdr and --held-out belong together"),
        (["--fdr", "efflite0,efflite0", "--held-out", held], "each once"),
        (
            ["--fdr", "efflite0", "--held-out", held, "--dinov2", str(weights)],
            "would not be used: --fdr efflite0 does not",
        ),
        (["--fdr", "inception", "--held-out", held], "FID requires --inception FILE"),
        (
            ["--fdr", "efflite0", "--held-out", held, "--metrics", "fd"],
            "leave out --tokenizer, --metrics and --features",
        ),
        (["--fdr", "efflite0", "--held-out", real, "--allow-few"], "name held-out images, not the real ones"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
