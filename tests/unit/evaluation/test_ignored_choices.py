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
