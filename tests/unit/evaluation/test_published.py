"""The published figures: the file, the page made from it, and which ones are shown beside a result."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megastar.checkpoint.convert import convert
from megastar.checkpoint.convert_weights import open_weights
from megastar.evaluation.protocol import not_recorded
from megastar.evaluation.published import IMAGENET, SIZES, beside, load_published, markdown
from megastar.evaluation.runner import _show
from megastar.sampling.options import SamplingOptions
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config

ROOT = Path(__file__).parents[3]


SAMPLER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_schedule": "constant", "cfg_interval": -1}
STAR = {
    "views": 2, "student_views": 2, "mask_ratio": 0.25, "alpha": 1.0, "beta": 0.5, "positions": 4, "step_loss": True,
    "view_loss": True, "teacher_decay": 0.9999,
}  # fmt: skip
BLOCKS = {12: 6, 24: 18, 36: 18}  # by n_layer


def result(n_layer=12, dim=768, guided=False, epochs=50.0, cfg_scale=1.0, pictures=50_000, size=256, **more):
    """As of `megastar sample` with the defaults of --count and `megastar evaluate`."""
    trained = {"self_guided": guided, "images_seen": int(epochs * IMAGENET)} if epochs else {"self_guided": guided}
    objective = STAR | {"contrastive_block": BLOCKS[n_layer]} if guided else {"views": 1}
    trained |= {"weights": "ema", "objective": objective}
    model = {"n_layer": n_layer, "dim": dim, "num_classes": 1000, "image_tokens": 256, "vocab_size": 16384}
    plan = "random" if cfg_scale == 2 else "balanced"  # LlamaGen's figures
    return {
        "metric": "FID",
        "scores": {"FID": 30.0},
        "generated": {"pictures": pictures, "size": size},
        "real": {"source": "VIRTUAL_imagenet256_labeled.npz", "statistics": "mu and sigma of the file"},
        "provenance": {"model": model, "trained": trained, "cfg_scale": cfg_scale, "label_plan": plan} | SAMPLER,
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0.8}, "temperature 0.8 instead of 1"),
        ({"top_k": 500}, "top_k 500 instead of 0"),
        ({"top_p": 0.9}, "top_p 0.9 instead of 1"),
        ({"parallel_steps": 64}, "parallel_steps 64 instead of one token per step"),
        ({"token_order": "random"}, "token_order random instead of raster"),
        ({"label_plan": "like codes/train"}, "label_plan like codes/train instead of balanced"),
        ({"temperature": {"a": 1}}, "temperature an object of 1 instead of 1"),
    ],
)
def test_other_sampling_is_named(changes, sentence):
    found = result()
    found["provenance"] |= changes
    (figure,) = beside(found)
    assert figure["differs"] == [sentence]


def test_sampling_without_effect_is_no_difference():
    """All codes are kept, and nothing is guided; a plan of classes that the source does not state is not compared."""
    found = result()
    found["provenance"] |= {"top_k": 16384, "cfg_schedule": "linear", "cfg_interval": 7, "label_plan": "random"}
    (figure,) = beside(found)
    assert figure["differs"] == []


def test_guidance_that_changes_along_the_tokens_is_another():
    for change in ({"cfg_schedule": "linear"}, {"cfg_interval": 100}, {"cfg_schedule": 5}):
        found = result(cfg_scale=2.0, epochs=300)
        found["provenance"] |= change
        assert beside(found) == []
    found = result(cfg_scale=2.0, epochs=300)
    found["provenance"]["cfg_interval"] = 254  # tokens 1 to 255, all after the first
    assert [f["scores"]["FID"] for f in beside(found)] == [5.46]
    found = result(n_layer=24, dim=1024, cfg_scale=2.0, epochs=300)
    found["provenance"]["cfg_schedule"] = "linear"
    (figure,) = beside(found)  # LlamaGen's, whose guidance is not stated
    assert figure["differs"][0] == "cfg_scale 2, cfg_schedule linear, the source does not state its own"


def test_the_classes_of_llamagens_figures_are_drawn():
    found = result(cfg_scale=2.0, epochs=300)
    found["provenance"]["label_plan"] = "balanced"
    assert beside(found)[0]["differs"] == ["label_plan balanced instead of random"]


def with_objective(found, method, **objective):
    found["provenance"]["trained"] |= {"method": method, "objective": objective}
    return found


def test_other_training_is_named():
    (figure,) = beside(with_objective(result(), "ar", views=2))
    assert figure["differs"] == ["views 2 instead of 1"]
    found = result(guided=True)
    found["provenance"]["trained"]["objective"] |= {"mask_ratio": 0.35, "step_loss": False, "contrastive_block": 7}
    assert beside(found)[0]["differs"] == [
        "mask_ratio 0.35 instead of 0.25",
        "step_loss False instead of True",
        "contrastive_block 7 instead of 6",
    ]
    other = {"views": 1, "repa_encoder": "efflite0", "repa_weight": 0.5, "repa_block": 4}
    (figure,) = beside(with_objective(result(epochs=300), "repa", **other))
    assert figure["differs"][1] == "repa_encoder efflite0 instead of dinov2"
    (figure,) = beside(with_objective(result(epochs=300), "repa", **other | {"repa_encoder": ""}))
    assert figure["differs"][1] == "not recorded: repa_encoder"
    found = result()
    found["provenance"]["trained"] |= {"weights": "student", "init": {"file": "base.pt", "step": 5}}
    assert beside(found)[0]["differs"] == [
        "student weights instead of ema",
        "the training started from base.pt (train.init); the epochs of these weights are not counted",
    ]


def test_what_is_not_recorded_is_named():
    found = result(guided=True)
    provenance = found["provenance"]
    found["provenance"] = {name: provenance[name] for name in ("model", "cfg_scale")}
    found["provenance"]["trained"] = {"self_guided": True, "images_seen": 50 * IMAGENET}  # of an older version
    (figure,) = beside(found)
    rest = "label_plan, weights, the crops and losses of the training"
    assert figure["differs"] == [f"not recorded: temperature, top_k, top_p, {rest}"]
    found = result(cfg_scale=2.0, epochs=300)
    for name in SAMPLER:
        del found["provenance"][name]
    assert beside(found)[0]["differs"] == ["not recorded: temperature, top_k, top_p, cfg_schedule, cfg_interval"]


def test_the_record_of_sampling_and_weights_has_every_setting(tmp_path):
    """Of this version: nothing is "not recorded"."""
    write_checkpoint(tmp_path / "run", config(data={"shards": "codes"}), 1, 1)
    convert(tmp_path / "run", "safetensors", tmp_path / "w.safetensors")
    trained = open_weights(tmp_path / "w.safetensors").provenance
    for scale in (1.0, 2.0):
        record = SamplingOptions(cfg_scale=scale).recorded() | {"trained": trained, "label_plan": "balanced"}
        for size in SIZES.values():
            assert not_recorded(record, "star", size) == []


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
    found = result(guided=True)
    for name in found["provenance"]["trained"]["objective"]:
        found["provenance"]["trained"]["objective"][name] = value
    assert isinstance(beside(found), list)
    for name in ("objective", "weights", "init"):
        found = result(guided=True)
        found["provenance"]["trained"][name] = value
        assert isinstance(beside(found), list)
    for name in ("cfg_scale", "model", "trained", "label_plan", "parallel_steps", "token_order", *SAMPLER):
        found = result()
        found["provenance"][name] = value
        assert isinstance(beside(found), list)
