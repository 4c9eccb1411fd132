"""A subset of images without folders, and a tokenizer for images that are no codes, are refused, not recorded as applied."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megastar.cli import main
from megastar.data.pretokenize.runner import pretokenize
from megastar.errors import UserError
from megastar.evaluation.image_sources import open_images
from megastar.evaluation.runner import evaluate_reconstruction
from tests.unit.evaluation.test_evaluation import folder_of, random_images, tokenizer_file


def test_a_subset_or_tokenizer_that_images_do_not_use_is_refused(tmp_path, monkeypatch, capsys):
    file, folder = tokenizer_file(tmp_path), folder_of(tmp_path, random_images(8))
    npz, codes, moments = tmp_path / "a.npz", tmp_path / "codes", tmp_path / "moments.npz"
    np.savez(npz, random_images(8))
    np.savez(moments, mu=np.zeros(2048), sigma=np.eye(2048))
    pretokenize(folder, None, file, codes, crops="center")
    for path, kind in ((npz, "an .npz has"), (codes, "token shards have")):
        with pytest.raises(
            UserError, match=f"{path}: {kind} no top-level folders, so the subset test cannot be chosen"
        ):
            open_images(path, subset="test", tokenizer=file if path == codes else None)
    for path in (npz, folder):
        with pytest.raises(UserError, match=f"{path} holds no token shards, so the tokenizer t would decode nothing"):
            open_images(path, tokenizer="t")
    assert open_images(folder, subset="class0").count == 4 and open_images(codes, tokenizer=file).count == 8

    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pixel_means.py").write_text("def mean(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    quick = "pixel_means:mean"  # features
    ours, out = ["evaluate", npz, "--real", folder], tmp_path / "r.json"
    for words, sentence in (
        (["evaluate", npz, "--real", npz, "--real-subset", "test"], f"{npz}: an .npz has no top-level folders"),
        (["evaluate", npz, "--real", moments, "--real-subset", "test"], f"{moments}: an .npz has no top-level folders"),
        (
            [*ours, "--subset", "test"],
            "so the subset test cannot be chosen: leave the subset out, or name a folder or tar",
        ),
        (
            [*ours, "--real-tokenizer", file],
            f"{folder} holds no token shards, so the tokenizer {file} would decode nothing",
        ),
        (
            [*ours, "--fdr", quick, "--held-out", npz, "--held-out-subset", "test"],
            "so the subset test cannot be chosen",
        ),
        (["evaluate", "--tokenizer", file, "--real", npz, "--real-subset", "test"], f"{npz}: an .npz has no top-level"),
        (["evaluate", "--tokenizer", file, "--real", folder, "--subset", "class0"], "--real: use --real-subset class0"),
        (["sample", "--real-subset", "test"], "--real-subset test belongs to a score: give --score and --real too"),
        (["sample"], f"--features {quick} belongs to a score: give --score and --real too"),
        ([*ours, "--inception-sha256", "ab"], "--inception-sha256 ab is the hash of a file: name the file with --inc"),
        (
            [*ours, "--fdr", quick, "--held-out", npz, "--kid-size", "50"],
            "--fdr computes Frechet distances only: leave out --kid-size 50",
        ),
    ):
        features = [] if "--fdr" in words else ["--features", quick]
        assert main([*map(str, words), *features, "--device", "cpu"]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    words = [
        "--tokenizer",
        file,
        "--real",
        folder,
        "--real-subset",
        "class0",
        "--features",
        quick,
        "--allow-few",
        "--out",
        out,
    ]
    assert main(["evaluate", *map(str, words)]) == 0
    assert json.loads(out.read_text())["real"]["pictures"] == 4  # what the refusal of --subset advises
    shown = evaluate_reconstruction(file, codes, real_tokenizer=file, features=quick, cache=tmp_path / "cache")
    assert shown["real"]["pictures"] == 8 and shown["real"]["tokenizer"] == str(file)


@pytest.mark.parametrize(
    "words", [["--kid-size", "50"], ["--kid-subsets", "100"], ["--is-split", "9"], ["--allow-few"]]
)
def test_settings_of_a_score_are_refused_without_one(words, capsys):
    assert main(["sample", *words]) == 2
    option = " ".join(words)
    assert f"{option} belongs to a score: give --score and --real too, or leave it out" in " ".join(
        capsys.readouterr().err.split()
    )


def test_settings_of_metrics_that_are_not_computed_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pixel_sums.py").write_text("def mean(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    a, out = str(tmp_path / "a.npz"), tmp_path / "r.json"
    score = ["evaluate", a, "--real", a, "--features", "pixel_sums:mean", "--device", "cpu", "--out", str(out)]
    assert main([*score, "--kid-size", "6", "--is-split", "7"]) == 0
    told = json.loads(out.read_text())["warnings"]
    assert "kid_size = 6 has no effect: the metric 'kid' is not computed (metrics: fd)" in told
    assert "is_split = 7 has no effect: the metric 'is' is not computed (metrics: fd)" in told
    assert main([*score, "--kid-size", "6", "--metrics", "fd,kid"]) == 0
    assert not any("no effect" in line for line in json.loads(out.read_text())["warnings"])


@pytest.mark.parametrize("place", ["made.json", "made/results.json"])
def test_a_repeated_command_replaces_its_result(tmp_path, monkeypatch, place):
    """Beside or in a folder of images, whose files it does not read."""
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pixel_rows.py").write_text("def mean(x):\n    return x.float().mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = folder_of(tmp_path, random_images(8), "made")
    words = ["evaluate", str(folder), "--real", str(folder), "--features", "pixel_rows:mean", "--device", "cpu"]
    for _ in range(2):
        assert main([*words, "--out", str(tmp_path / place)]) == 0
    assert json.loads((tmp_path / place).read_text())["generated"]["pictures"] == 8
