"""The published figures: the file, the page made from it, and which ones are shown beside a result."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megastar.evaluation.published import IMAGENET, SIZES, beside, load_published, markdown
from megastar.evaluation.runner import _show

ROOT = Path(__file__).parents[3]


def result(n_layer=12, dim=768, guided=False, epochs=50.0, cfg_scale=1.0, pictures=50_000, size=256, **more):
    trained = {"self_guided": guided, "images_seen": int(epochs * IMAGENET)} if epochs else {"self_guided": guided}
    model = {"n_layer": n_layer, "dim": dim, "num_classes": 1000, "image_tokens": 256}
    return {
        "metric": "FID",
        "scores": {"FID": 30.0},
        "generated": {"pictures": pictures, "size": size},
        "real": {"source": "VIRTUAL_imagenet256_labeled.npz", "statistics": "mu and sigma of the file"},
        "provenance": {"model": model, "trained": trained, "cfg_scale": cfg_scale},
    } | more


def test_the_page_is_made_from_the_file():
    page = (ROOT / "docs/published.md").read_text()
    assert page.endswith("\n" + markdown())


def test_every_figure_has_a_source_and_plausible_scores():
    _, size, figures = load_published()
    assert size == 256 and len(figures) > 25
    for f in figures:
        assert "arXiv" in f.source or "github.com" in f.source
        assert 1 < f.scores["FID"] < 40 and all(0 < f.scores.get(n, 0.5) < 1 for n in ("precision", "recall"))
        assert f.size in SIZES.values() or f.method == "rar"
    keys = [(f.paper, f.method, f.size, f.tokens, f.epochs, f.cfg_scale) for f in figures]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("changes", "fid"),
    [
        ({}, 31.35),
        ({"guided": True}, 26.58),
        ({"guided": True, "epochs": 300.4, "n_layer": 36, "dim": 1280}, 6.20),
        ({"cfg_scale": 2.0, "epochs": 300.0}, 5.46),
    ],
)
def test_the_same_protocol_has_no_difference(changes, fid):
    (found,) = beside(result(**changes))
    assert found["scores"]["FID"] == fid and found["differs"] == []


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 60.0}, {"cfg_scale": 1.3}, {"dim": 512}, {"scores": {"FD-EffLite0": 3.0}}, {"provenance": {}}],
)
def test_other_networks_epochs_guidance_and_scores_have_none(changes):
    assert beside(result(**changes)) == []


@pytest.mark.parametrize(
    ("method", "fids"),
    [
        ("ar", [26.26]),
        ("star", [18.44]),
        ("repa", [20.16]),
        *((name, []) for name in ("random", "star+repa", "repa+random", "star+random", "tomorrow's")),
    ],
)
def test_the_recorded_method_decides(method, fids):
    found = result(epochs=300, guided=method.startswith("star"))
    found["provenance"]["trained"]["method"] = method
    assert [figure["scores"]["FID"] for figure in beside(found)] == fids


def test_a_network_of_other_data_has_none():
    found = result()
    found["provenance"]["model"]["num_classes"] = 9
    assert beside(found) == []


def test_differences_of_the_protocol_are_named():
    real = {"source": "imagenet/val"}
    (found,) = beside(result(pictures=5000, size=128, real=real))
    assert found["differs"] == [
        "5000 samples instead of 50000",
        "pictures of 128 x 128 instead of 256 x 256 pixels",
        "the reference is imagenet/val instead of ADM's VIRTUAL_imagenet256_labeled.npz",
    ]
    both = beside(result(epochs=0))
    assert {f["scores"]["FID"] for f in both} == {31.35, 26.26}
    assert all("the epochs of these weights are not recorded" in f["differs"][0] for f in both)


def test_they_are_printed_beside_the_measured_score():
    out = io.StringIO()
    measured = result(pictures=10_000)
    _show(measured | {"published": beside(measured)}, Console(file=out, width=300))
    text = out.getvalue()
    assert "published: FID 31.35, sFID 8.75" in text and "AR B in ST-AR, 50 epochs, no guidance" in text
    assert "Here: 10000 samples instead of 50000" in text


@pytest.mark.parametrize("value", [None, [1], {}, "x", True, 10**400, float("nan"), float("inf"), -5])
def test_damaged_provenance_is_tolerated(value):
    for section, name in (
        ("model", "dim"),
        ("model", "image_tokens"),
        ("trained", "images_seen"),
        ("trained", "method"),
    ):
        found = result()
        found["provenance"][section][name] = value
        assert isinstance(beside(found), list)
    for name in ("cfg_scale", "model", "trained"):
        found = result()
        found["provenance"][name] = value
        assert isinstance(beside(found), list)
